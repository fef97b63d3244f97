"""Random operations on PiKV layers and their forks, against a plain dense reference after every step."""

import dataclasses
import gc
from typing import Any

import numpy as np
import torch
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM, FakeAttachment
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from padded_masks import of_padding

from pikv_hf.common.tensors import live_bytes
from pikv_hf.config import PiKVConfig
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer

# The most that packing may change a number by, for standard normal tokens; a basis of half the rank may lose anything.
CHANGE = {
    "none": 0.0,
    "int8": 0.06,
    "int4": 0.8,
    "int2": 4.0,
    "fp8": 0.3,
    "lowrank": 9.0,
    "lowrank+int4": 1.0,
    "auto": 4.0,
}
CODECS = [("none", "none"), *((name, name) for name in CHANGE), ("int4", "none"), ("none", "int8"), ("auto", "lowrank")]


@dataclasses.dataclass
class Row:
    """One row of the reference: everything ever kept, in time order."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: list[int]
    experts: list[int]
    packed: set[int] = dataclasses.field(default_factory=set)

    def copy(self) -> "Row":
        return Row(self.keys, self.values, list(self.positions), list(self.experts), set(self.packed))

    def attend(self, query: torch.Tensor, until: int | None = None) -> torch.Tensor:
        """Return attention of `(Hq, D)` over the tokens before position `until`, `(Hq, Dv)`."""
        n = len(self.positions) if until is None else sum(p < until for p in self.positions)
        if n == 0:
            return torch.zeros(query.shape[0], VALUE_DIM, dtype=torch.float64)
        keys = self.keys[:, :n].repeat_interleave(GROUPS, 0).double()
        values = self.values[:, :n].repeat_interleave(GROUPS, 0).double()
        weights = torch.softmax(torch.einsum("hd,htd->ht", query.double(), keys) * SCALE, dim=-1)
        return torch.einsum("ht,htd->hd", weights, values)

    def crop(self, length: int) -> "Row":
        n = sum(p < length for p in self.positions)
        kept = self.positions[:n]
        return Row(self.keys[:, :n], self.values[:, :n], kept, self.experts[:n], self.packed & set(kept))


@dataclasses.dataclass
class Twin:
    """A layer and its reference."""

    layer: PiKVLayer
    rows: list[Row]
    seen: int = 0


class LayerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4, 8]),
        recent_window=st.sampled_from([0, 2, 5, 16]),
        sink_tokens=st.sampled_from([0, 1, 4, 9]),
        num_shards=st.sampled_from([1, 3, 8]),
        batch=st.integers(1, 3),
        codecs=st.sampled_from(CODECS),
        seed=st.integers(0, 2**16),
    )
    def start(self, batch: int, seed: int, codecs: tuple[str, str], **options: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.codecs = codecs
        config = PiKVConfig(key_codec=codecs[0], value_codec=codecs[1], rank=4, **options)
        self.num_shards = min(config.num_shards, EXPERTS)
        layer = PiKVLayer(0, config, FakeAttachment())
        self.twins = [Twin(layer, [self.empty_row() for _ in range(batch)])]

    def empty_row(self) -> Row:
        return Row(torch.zeros(HEADS, 0, KEY_DIM), torch.zeros(HEADS, 0, VALUE_DIM), [], [])

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def pick(self, index: int) -> Twin:
        return self.twins[index % len(self.twins)]

    @rule(which=st.integers(0, 9), new=st.integers(1, 12), padding=st.booleans(), identical=st.booleans())
    def append(self, which: int, new: int, padding: bool, identical: bool) -> None:
        twin = self.pick(which)
        batch = len(twin.rows)
        keys, values = self.random(batch, HEADS, new, KEY_DIM), self.random(batch, HEADS, new, VALUE_DIM)
        query = self.random(batch, HEADS * GROUPS, new, KEY_DIM)
        experts = torch.randint(0, EXPERTS, (batch, new), generator=self.generator)
        if identical:
            keys, values, experts = (t[:1].expand(t.shape).contiguous() for t in (keys, values, experts))
        valid = torch.ones(batch, new, dtype=torch.bool)
        if padding and new > 1:
            valid[:, : new - 1] = torch.rand((batch, new - 1), generator=self.generator) < 0.6
        # What the router has just placed may be packed when the next tokens come.
        twin.layer.settle()
        self.contents_agree()
        got_keys, got_values = twin.layer.update(keys, values)
        mask = self.mask(twin, valid)
        out, _ = pikv_attention_forward(ATTENTION, query, got_keys, got_values, mask, scaling=SCALE)
        twin.layer.record_experts(experts.reshape(-1))
        for row, reference in enumerate(twin.rows):
            real = valid[row].nonzero().squeeze(1)
            reference.keys = torch.cat([reference.keys, keys[row][:, real]], dim=1)
            reference.values = torch.cat([reference.values, values[row][:, real]], dim=1)
            reference.positions += [twin.seen + int(i) for i in real]
            reference.experts += experts[row, real].tolist()
            for i in real.tolist():
                expected = reference.attend(query[row, :, i], twin.seen + i + 1)
                torch.testing.assert_close(out[row, i].double(), expected, atol=1e-5, rtol=1e-5)
        twin.seen += new

    def mask(self, twin: Twin, valid: torch.Tensor) -> torch.Tensor | None:
        """Return what a model would pass: None if plain causal, else a mask over all logical positions."""
        if bool(valid.all()) and all(len(row.positions) == twin.seen for row in twin.rows):
            return None
        batch, new = valid.shape
        mask = torch.zeros(batch, 1, new, twin.seen + new, dtype=torch.bool)
        for row, reference in enumerate(twin.rows):
            mask[row, :, :, reference.positions] = True
        causal = torch.ones(new, new, dtype=torch.bool).tril()
        mask[:, 0, :, twin.seen :] = causal & valid[:, None, :] & valid[:, :, None]
        return of_padding(mask, valid)

    @rule(which=st.integers(0, 9), share=st.floats(0, 1), negative=st.booleans())
    def crop(self, which: int, share: float, negative: bool) -> None:
        twin = self.pick(which)
        length = int(twin.seen * share)
        twin.layer.crop(length - twin.seen if length < twin.seen and (negative or not length) else length)
        twin.rows = [row.crop(length) for row in twin.rows]
        twin.seen = min(twin.seen, length)

    @precondition(lambda self: len(self.twins) < 4)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        twin = self.pick(which)
        self.twins.append(Twin(twin.layer.fork(), [r.copy() for r in twin.rows], twin.seen))

    @precondition(lambda self: len(self.twins) > 1)
    @rule(which=st.integers(0, 9))
    def drop_fork(self, which: int) -> None:
        self.twins.pop(which % len(self.twins))
        gc.collect()

    @rule(which=st.integers(0, 9), order=st.lists(st.integers(0, 9), min_size=1, max_size=5))
    def select(self, which: int, order: list[int]) -> None:
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        indices = [i % len(twin.rows) for i in order]
        twin.layer.batch_select_indices(torch.tensor(indices))
        twin.rows = [twin.rows[i].copy() for i in indices]

    @rule(which=st.integers(0, 9), seed=st.integers(0, 99))
    def reorder(self, which: int, seed: int) -> None:
        size = len(self.pick(which).rows)
        self.select(which, torch.randint(0, size, (size,), generator=torch.Generator().manual_seed(seed)).tolist())

    @rule(which=st.integers(0, 9))
    def repeat(self, which: int) -> None:
        twin = self.pick(which)
        if len(twin.rows) <= 2 and twin.layer.table is not None:
            twin.layer.batch_repeat_interleave(2)
            twin.rows = [row.copy() for row in twin.rows for _ in range(2)]

    @rule(which=st.integers(0, 9))
    def reset(self, which: int) -> None:
        twin = self.pick(which)
        twin.layer.reset()
        twin.rows, twin.seen = [self.empty_row() for _ in twin.rows], 0

    @invariant()
    def contents_agree(self) -> None:
        for twin in getattr(self, "twins", []):
            layer = twin.layer
            assert layer.get_seq_length() == twin.seen
            if layer.table is None:
                continue
            assert layer.table.tokens() == [len(row.positions) for row in twin.rows]
            query = self.random(len(twin.rows), HEADS * GROUPS, 1, KEY_DIM)
            keys, values = layer.dense()
            out, _ = attend(layer, query, scale=SCALE)
            for row, reference in enumerate(twin.rows):
                held = keys[row][:, reference.positions], values[row][:, reference.positions]
                self.changed_once_at_most(reference, *held)
                torch.testing.assert_close(
                    out[row, :, 0].double(), reference.attend(query[row, :, 0]), atol=1e-5, rtol=1e-5
                )

    def changed_once_at_most(self, reference: Row, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compare what is held with what was last held; packing may change a token, once and a little."""
        changed: set[int] = set()
        for old, new, codec in ((reference.keys, keys, self.codecs[0]), (reference.values, values, self.codecs[1])):
            assert float((old - new).abs().amax()) <= CHANGE[codec] if old.numel() else True
            # Decoding the same codes twice may round differently, by the place of a number in a vector register.
            moved = (old - new).abs() > (0 if codec == "none" else 1e-5)
            changed |= {reference.positions[i] for i in moved.any(dim=2).any(dim=0).nonzero()[:, 0].tolist()}
        assert not changed & reference.packed, "a packed token changed"
        reference.keys, reference.values = keys, values
        reference.packed |= changed

    @invariant()
    def pages_add_up(self) -> None:
        pools: dict[int, Any] = {}
        held: dict[int, list[np.ndarray]] = {}
        for twin in getattr(self, "twins", []):
            table = twin.layer.table
            if table is None:
                continue
            twin.layer.store.release_abandoned()
            for name, pool in table.pools.by_id().items():
                pools[id(pool)] = pool
                for sequence in {id(s): s for s in table.rows}.values():
                    held.setdefault(id(pool), []).append(sequence.pages(name))
            for sequence in {id(s): s for s in table.rows}.values():
                size = table.plain.page_size
                assert all(table.plain.count[p] == size for p in [*sequence.full, *sequence.window[:-1]])
                assert all(0 < table.plain.count[p] < size for p in sequence.open[sequence.open >= 0])
            self.shards_follow_experts(twin)
        for key, pool in pools.items():
            expected = np.bincount(np.concatenate(held[key]), minlength=pool.capacity)
            assert (pool.allocator.refcount == expected).all(), "references do not match the sequences that hold pages"
            in_use = pool.index(np.flatnonzero(pool.allocator.refcount))
            filled = (pool.positions[in_use] >= 0).sum(dim=1).numpy()
            assert (filled == pool.count[pool.allocator.refcount > 0]).all()
            assert live_bytes(pool.tensors()) == sum(t.numel() * t.element_size() for t in pool.tensors())

    def shards_follow_experts(self, twin: Twin) -> None:
        for sequence, reference in zip(twin.layer.table.rows, twin.rows, strict=True):
            by_position = dict(zip(reference.positions, reference.experts, strict=True))
            for name, pool in twin.layer.table.pools.by_id().items():
                for page in sequence.pages(name):
                    shard = pool.shard[page]
                    for position in pool.positions[page][: pool.count[page]].tolist():
                        assert shard < 0 or shard == by_position[position] * self.num_shards // EXPERTS
