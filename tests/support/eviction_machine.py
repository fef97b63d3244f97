"""Random evictions among appending, cropping, forking and reordering a layer, against dense masked attention."""

import dataclasses
import gc
from typing import Any

import numpy as np
import torch
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM, FakeAttachment
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layer_machine import CHANGE
from padded_masks import going_on

from pikv_hf.config import PiKVConfig
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer


@dataclasses.dataclass
class Twin:
    """A layer and what it should hold: dense K/V by column, and which columns of each head are there."""

    layer: PiKVLayer
    keys: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor
    packed: torch.Tensor

    @property
    def seen(self) -> int:
        return self.held.shape[2]

    def change(self, make: Any) -> None:
        for name in ("keys", "values", "held", "packed"):
            setattr(self, name, make(getattr(self, name)))


def reference_attention(twin: Twin, query: torch.Tensor) -> torch.Tensor:
    """Return attention of `(B, Hq, D)` over what is held, `(B, Hq, Dv)`, float64; zeros where nothing is."""
    keys, values = (part.repeat_interleave(GROUPS, 1).double() for part in (twin.keys, twin.values))
    held = twin.held.repeat_interleave(GROUPS, 1)
    logits = torch.einsum("bhd,bhtd->bht", query.double(), keys) * SCALE
    logits = logits.masked_fill(~held, -torch.inf)
    weights = torch.where(held.any(-1, keepdim=True), logits.softmax(-1), 0)
    return torch.einsum("bht,bhtd->bhd", weights.nan_to_num(), values)


def bits_of_tokens(layer: PiKVLayer) -> torch.Tensor:
    """Return `(B, H, T)` int64, in how many bits tokens are packed; 0 where they are not, or by a codec without any."""
    bits = torch.zeros(layer.batch, HEADS, layer.seen, dtype=torch.int64)
    by_codec = {"int2": 2, "int4": 4, "int8": 8, "none": 16}
    for table in [part.table for part in layer.parts if part.table is not None]:
        for pool_id, pool in table.pools.packed.items():
            for number, row in enumerate(table.rows):
                sequence, lane = divmod(number, layer.store.lanes)
                columns = pool.positions[pool.index(row.pages(pool_id))]
                heads = slice(lane, lane + 1) if layer.store.lanes > 1 else slice(None)
                bits[sequence, heads, columns[columns >= 0].long()] = by_codec.get(pool_id.key_codec, 0)
    return bits


class EvictionMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4, 8]),
        recent_window=st.sampled_from([0, 2, 5, 16]),
        sink_tokens=st.sampled_from([0, 1, 4]),
        num_shards=st.sampled_from([1, 3]),
        batch=st.integers(1, 3),
        codec=st.sampled_from(["none", "none", "int8", "int4", "int2", "fp8", "auto", "lowrank"]),
        seed=st.integers(0, 2**16),
    )
    def start(self, batch: int, seed: int, codec: str, **options: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.codec = codec
        layer = PiKVLayer(0, PiKVConfig(key_codec=codec, value_codec=codec, rank=4, **options), FakeAttachment())
        self.twins = [self.empty(layer, batch)]

    def empty(self, layer: PiKVLayer, batch: int) -> Twin:
        none = torch.zeros(batch, HEADS, 0, dtype=torch.bool)
        return Twin(layer, torch.zeros(*none.shape, KEY_DIM), torch.zeros(*none.shape, VALUE_DIM), none, none.clone())

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def pick(self, index: int) -> Twin:
        return self.twins[index % len(self.twins)]

    @rule(which=st.integers(0, 9), new=st.integers(1, 14), identical=st.booleans(), held=st.booleans())
    def append(self, which: int, new: int, identical: bool, held: bool) -> None:
        twin = self.pick(which)
        batch = twin.held.shape[0]
        keys, values = self.random(batch, HEADS, new, KEY_DIM), self.random(batch, HEADS, new, VALUE_DIM)
        query = self.random(batch, HEADS * GROUPS, new, KEY_DIM)
        if identical:
            keys, values = keys[:1].expand_as(keys).contiguous(), values[:1].expand_as(values).contiguous()
        twin.layer.settle()
        self.contents_agree()
        if held:
            twin.layer.edits.begin_press()
        got = twin.layer.update(keys, values)
        mask = going_on(twin.layer, new)
        out, _ = pikv_attention_forward(ATTENTION, query, *got, mask, scaling=SCALE)
        experts = torch.randint(0, EXPERTS, (1 if identical else batch, new), generator=self.generator)
        twin.layer.record_experts(experts.expand(batch, new).reshape(-1))
        there = torch.ones(batch, HEADS, new, dtype=torch.bool)
        twin.keys, twin.values = torch.cat([twin.keys, keys], 2), torch.cat([twin.values, values], 2)
        twin.held = torch.cat([twin.held, there], 2)
        twin.packed = torch.cat([twin.packed, ~there], 2)
        last = reference_attention(twin, query[:, :, -1])
        torch.testing.assert_close(out[:, -1].double(), last, atol=1e-5, rtol=1e-5)

    @rule(which=st.integers(0, 9), share=st.floats(0, 1), by_head=st.booleans(), widths=st.booleans())
    def keep(self, which: int, share: float, by_head: bool, widths: bool) -> None:
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        shape = (*twin.held.shape[:1], HEADS if by_head else 1, twin.seen)
        kept = (torch.rand(shape, generator=self.generator) < share).expand_as(twin.held)
        if widths:
            bits = torch.tensor([2, 4, 8, 16])[torch.randint(0, 4, shape, generator=self.generator)]
            twin.layer.settle()
            # Only fewer bits than there are have a packed token packed again.
            twin.packed &= bits_of_tokens(twin.layer) <= bits
            twin.layer.keep(bits.expand_as(kept) * kept)
        else:
            twin.layer.keep(kept)
        twin.held = twin.held & kept
        dense = twin.layer.dense()
        self.changed_once_at_most(twin, *dense, most=CHANGE["int2"] if widths else CHANGE[self.codec])

    @rule(which=st.integers(0, 9), share=st.floats(0, 1))
    def crop(self, which: int, share: float) -> None:
        twin = self.pick(which)
        length = int(twin.seen * share)
        twin.layer.truncate(length)
        twin.change(lambda part: part[:, :, :length])

    @precondition(lambda self: len(self.twins) < 4)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        twin = self.pick(which)
        twin.layer.settle()
        self.contents_agree()
        copies = {name: getattr(twin, name).clone() for name in ("keys", "values", "held", "packed")}
        self.twins.append(Twin(twin.layer.fork(), **copies))

    @precondition(lambda self: len(self.twins) > 1)
    @rule(which=st.integers(0, 9))
    def drop_fork(self, which: int) -> None:
        self.twins.pop(which % len(self.twins))
        gc.collect()

    @rule(which=st.integers(0, 9), order=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def select(self, which: int, order: list[int]) -> None:
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        indices = torch.tensor([i % len(twin.held) for i in order])
        twin.layer.batch_select_indices(indices)
        twin.change(lambda part: part[indices])

    @rule(which=st.integers(0, 9))
    def assign(self, which: int) -> None:
        """A slice of what was handed out is a crop; a copy of it is stored anew."""
        twin = self.pick(which)
        if twin.layer.table is None or not twin.seen:
            return
        length = max(1, twin.seen - 2)
        keys, values = twin.layer.keys, twin.layer.values
        twin.layer.keys, twin.layer.values = keys[:, :, :length], values[:, :, :length]
        twin.change(lambda part: part[:, :, :length])

    @invariant()
    def contents_agree(self) -> None:
        for twin in getattr(self, "twins", []):
            assert twin.layer.get_seq_length() == twin.seen
            if twin.layer.table is None:
                continue
            assert torch.equal(twin.layer.stored_mask(), twin.held)
            self.changed_once_at_most(twin, *twin.layer.dense(), most=CHANGE[self.codec])
            query = self.random(len(twin.held), HEADS * GROUPS, 1, KEY_DIM)
            if twin.layer.pending is None and twin.seen:
                out, _ = attend(twin.layer, query, scale=SCALE)
                expected = reference_attention(twin, query[:, :, 0])
                torch.testing.assert_close(out[:, :, 0].double(), expected, atol=1e-5, rtol=1e-5)

    def changed_once_at_most(self, twin: Twin, keys: torch.Tensor, values: torch.Tensor, most: float) -> None:
        """Packing may change a token, once; a token that is not held reads as zeros."""
        for old, new in ((twin.keys, keys), (twin.values, values)):
            difference = ((old - new).abs().amax(-1) * twin.held) if old.numel() else torch.zeros(twin.held.shape)
            assert float(difference.max() if difference.numel() else 0) <= most
            changed = difference > (0 if most == 0 else 1e-5)
            assert not bool((changed & twin.packed).any()), "a packed token changed"
            twin.packed = twin.packed | (changed if old is twin.values else torch.zeros_like(changed))
            if twin.layer.pending is None:
                assert not bool((new * ~twin.held[..., None]).any())
        twin.keys, twin.values = keys.clone(), values.clone()

    @invariant()
    def pages_add_up(self) -> None:
        held: dict[int, list[np.ndarray]] = {}
        pools: dict[int, Any] = {}
        for twin in getattr(self, "twins", []):
            if twin.layer.table is None:
                continue
            twin.layer.store.release_abandoned()
            for name, pool in twin.layer.table.pools.by_id().items():
                pools[id(pool)] = pool
                for sequence in {id(s): s for s in twin.layer.table.rows}.values():
                    held.setdefault(id(pool), []).append(sequence.pages(name))
        for key, pool in pools.items():
            expected = np.bincount(np.concatenate(held[key]), minlength=pool.capacity)
            assert (pool.allocator.refcount == expected).all(), "references do not match the sequences that hold pages"
            in_use = np.flatnonzero(pool.allocator.refcount)
            assert ((pool.positions[pool.index(in_use)] >= 0).sum(dim=1).numpy() == pool.count[in_use]).all()
