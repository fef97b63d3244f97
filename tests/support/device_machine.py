"""Random operations on layers in several parts, against dense masked attention."""

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
from eviction_machine import EvictionMachine, Twin, reference_attention
from failing_memory import no_memory_for
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM, FakeAttachment
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from padded_masks import of_padding

from pikv_hf.common.tensors import live_bytes
from pikv_hf.config import PiKVConfig
from pikv_hf.distributed.device_layout import PartLayout, PartLocation
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_reads import storages
from pikv_hf.pages.pool_id import PLAIN
from pikv_hf.reports.memory_measure import layer_memory

#: The share of the tokens that each part is to get; the first has nothing but the window where it is 0.
WEIGHTS = [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (1.0,) * 7]
NAMES = ("keys", "values", "held", "packed")


def layout_of(weights: tuple[float, ...]) -> PartLayout:
    """Return logical devices of the CPU, the first on the layer's own."""
    places = [PartLocation(n, torch.device("cpu", n) if n else None, f"cpu:{n}") for n in range(len(weights))]
    return PartLayout(tuple(places), weights)


class DeviceMachine(EvictionMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4, 8]),
        recent_window=st.sampled_from([0, 2, 5, 16]),
        sink_tokens=st.sampled_from([0, 1, 4]),
        num_shards=st.sampled_from([1, 3, 8]),
        batch=st.integers(1, 3),
        codec=st.sampled_from(["none", "none", "int8", "int4", "int2", "fp8", "auto", "lowrank"]),
        weights=st.sampled_from(WEIGHTS),
        placement=st.sampled_from(["expert", "balanced"]),
        seed=st.integers(0, 2**16),
    )
    def start(self, batch: int, seed: int, codec: str, weights: Any = None, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.codec = codec
        config = PiKVConfig(key_codec=codec, value_codec=codec, rank=4, **options)
        layer = PiKVLayer(0, config, FakeAttachment(), layout_of(weights))
        self.twins = [self.empty(layer, batch)]
        # A few tokens are enough for shards to be divided anew, and for pages to move.
        self.patches = [
            mock.patch("pikv_hf.sharding.shard_map.MIN_PAGES", 1),
            mock.patch("pikv_hf.layer.page_migration.MIN_PAGES", 1),
        ]
        for patch in self.patches:
            patch.start()

    def teardown(self) -> None:
        for patch in getattr(self, "patches", []):
            patch.stop()

    def read(self, twin: Twin, new: int, valid: torch.Tensor) -> None:
        """Let the layer read tokens, of which those that are not valid are padding."""
        batch = len(valid)
        keys, values = self.random(batch, HEADS, new, KEY_DIM), self.random(batch, HEADS, new, VALUE_DIM)
        query = self.random(batch, HEADS * GROUPS, new, KEY_DIM)
        got = twin.layer.update(keys, values)
        held = torch.cat([twin.held, valid[:, None].expand(-1, HEADS, -1)], dim=2)
        mask = held.any(dim=1)[:, None, None] & torch.ones(new, held.shape[2], dtype=torch.bool).tril(twin.seen)
        mask &= valid[:, None, :, None]
        # The model numbers positions on where a press has picked tokens.
        mask = torch.nn.functional.pad(mask, (twin.layer.state.dropped, 0), value=True)
        out, _ = pikv_attention_forward(ATTENTION, query, *got, of_padding(mask, valid), scaling=SCALE)
        twin.keys, twin.values = torch.cat([twin.keys, keys], 2), torch.cat([twin.values, values], 2)
        twin.held = held
        twin.packed = torch.cat([twin.packed, torch.zeros(batch, HEADS, new, dtype=torch.bool)], 2)
        last = reference_attention(twin, query[:, :, -1])
        torch.testing.assert_close(out[:, -1].double(), last, atol=1e-5, rtol=1e-5)
        twin.layer.record_experts(torch.randint(0, EXPERTS, (batch * new,), generator=self.generator))

    def settle(self, twin: Twin) -> None:
        twin.layer.settle()
        self.contents_agree()

    @rule(which=st.integers(0, 9), new=st.integers(2, 14))
    def append_padded(self, which: int, new: int) -> None:
        twin = self.pick(which)
        valid = torch.rand((len(twin.held), new), generator=self.generator) < 0.6
        valid[:, -1] = True
        self.settle(twin)
        self.read(twin, new, valid)

    @rule(which=st.integers(0, 9), expert=st.integers(0, EXPERTS - 1), new=st.integers(20, 60))
    def append_skewed(self, which: int, expert: int, new: int) -> None:
        """One expert takes all: parts are uneven until shards are divided anew and pages have moved."""
        twin = self.pick(which)
        self.settle(twin)
        with mock.patch.object(torch, "randint", return_value=torch.full((len(twin.held) * new,), expert)):
            self.read(twin, new, torch.ones(len(twin.held), new, dtype=torch.bool))

    @rule(which=st.integers(0, 9), part=st.integers(0, 6), new=st.sampled_from([1, 1, 2, 9, 40]))
    def append_without_memory(self, which: int, part: int, new: int) -> None:
        """One part cannot grow: all of them are as they were, and go on once there is memory."""
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        self.settle(twin)
        before = {name: getattr(twin, name) for name in NAMES}
        with no_memory_for(twin.layer, part % len(twin.layer.parts)), contextlib.suppress(MemoryError):
            self.read(twin, new, torch.ones(len(twin.held), new, dtype=torch.bool))
        if twin.layer.seen < twin.seen:
            twin.change(lambda part: part[:, :, : twin.layer.seen])
            assert all(torch.equal(getattr(twin, name), value) for name, value in before.items())

    @rule(which=st.integers(0, 9), part=st.integers(0, 6))
    def settle_without_memory(self, which: int, part: int) -> None:
        twin = self.pick(which)
        if twin.layer.table is not None:
            with no_memory_for(twin.layer, part % len(twin.layer.parts)), contextlib.suppress(MemoryError):
                twin.layer.settle()

    @rule(which=st.integers(0, 9), part=st.integers(0, 6), share=st.floats(0, 1))
    def crop_without_memory(self, which: int, part: int, share: float) -> None:
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        length = int(twin.seen * share)
        with no_memory_for(twin.layer, part % len(twin.layer.parts)), contextlib.suppress(MemoryError):
            twin.layer.truncate(length)
        assert twin.layer.seen in (length, twin.seen)
        twin.change(lambda part: part[:, :, : twin.layer.seen])

    @rule(which=st.integers(0, 9), new=st.integers(1, 9))
    def ask_and_return(self, which: int, new: int) -> None:
        """What kvpress does with a question: the layer's length is asked before it and restored after it."""
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        self.settle(twin)
        length, old = twin.seen, {name: getattr(twin, name).clone() for name in NAMES}
        twin.layer.edits.request_snapshot()
        self.read(twin, new, torch.ones(len(twin.held), new, dtype=torch.bool))
        self.contents_agree()
        twin.layer.truncate(length)
        twin.change(lambda part: part[:, :, :length])
        if twin.layer.table.pools.encoders.packs:
            # What the question packed is as it was, bit by bit.
            for name in NAMES:
                setattr(twin, name, old[name])
            assert all(map(torch.equal, twin.layer.dense(), (twin.keys, twin.values)))

    @rule(which=st.integers(0, 9))
    def assign(self, which: int) -> None:
        if not any(self.pick(which).layer.store.padding()):
            super().assign(which)

    @rule(which=st.integers(0, 9), share=st.floats(0.1, 1))
    def pick_tokens(self, which: int, share: float) -> None:
        """Assign some of the tokens: they are columns 0, 1, ... from then on."""
        twin = self.pick(which)
        if twin.layer.table is None or not twin.seen or any(twin.layer.store.padding()) or not bool(twin.held.all()):
            return
        columns = torch.arange(twin.seen)[torch.rand(twin.seen, generator=self.generator) < share]
        if len(columns):
            keys, values = twin.layer.keys, twin.layer.values
            twin.layer.keys, twin.layer.values = keys[:, :, columns].clone(), values[:, :, columns].clone()
            twin.keys, twin.values = twin.layer.dense()
            twin.held, twin.packed = twin.held[:, :, columns], torch.zeros_like(twin.held[:, :, columns])

    @precondition(lambda self: getattr(self, "twins", None))
    @rule(which=st.integers(0, 9))
    def reset(self, which: int) -> None:
        twin = self.pick(which)
        twin.layer.reset()
        twin.change(lambda part: part[:, :, :0])

    @invariant()
    def every_token_is_in_one_part(self) -> None:
        for twin in getattr(self, "twins", []):
            layer = twin.layer
            if layer.table is None:
                continue
            stored = layer.seen - (0 if layer.pending is None else layer.pending.tokens)
            shape = (len(twin.held), layer.store.lanes, stored)
            owners = torch.zeros(shape, dtype=torch.int64)
            for table in layer.store.tables():
                assert len(table.rows) == len(layer.table.rows)
                owners += table.view.stored_mask(stored).view(shape)
            assert torch.equal(owners.expand(-1, HEADS, -1), twin.held[:, :, :stored].long())
            self.rows_are_alike(layer)
            for number, weight in enumerate(layer.layout.weights):
                if not weight and not layer.state.evicted and not layer.state.dropped:
                    table = layer.parts[number].table
                    assert all(len(row.pages(name)) == len(row.window) for row in table.rows for name in [PLAIN])

    def rows_are_alike(self, layer: PiKVLayer) -> None:
        """All parts share sequences among their rows alike, and have the same tokens in their windows."""
        alike = []
        for table in layer.store.tables():
            ids = [id(row) for row in table.rows]
            windows = [table.plain.positions[table.plain.index(np.array(row.window, dtype=int))] for row in table.rows]
            alike.append(([ids.index(each) for each in ids], [sorted(w[w >= 0].tolist()) for w in windows]))
        assert all(each == alike[0] for each in alike)

    @invariant()
    def pages_add_up(self) -> None:
        held: dict[int, list[np.ndarray]] = {}
        pools: dict[int, Any] = {}
        for twin in getattr(self, "twins", []):
            twin.layer.store.release_abandoned()
            for table in twin.layer.store.tables():
                for name, pool in table.pools.by_id().items():
                    pools[id(pool)] = pool
                    for sequence in {id(s): s for s in table.rows}.values():
                        held.setdefault(id(pool), []).append(sequence.pages(name))
            if twin.layer.edits.snapshot is not None:
                for table in twin.layer.edits.snapshot.tables:
                    for name, pool in table.pools.by_id().items():
                        for sequence in {id(s): s for s in table.rows}.values():
                            held.setdefault(id(pool), []).append(sequence.pages(name))
        for key, pool in pools.items():
            expected = np.bincount(np.concatenate(held[key]), minlength=pool.capacity)
            assert (pool.allocator.refcount == expected).all(), "references do not match the sequences that hold pages"
            in_use = np.flatnonzero(pool.allocator.refcount)
            assert ((pool.positions[pool.index(in_use)] >= 0).sum(dim=1).numpy() == pool.count[in_use]).all()

    @invariant()
    def reported_bytes_are_live(self) -> None:
        for twin in getattr(self, "twins", []):
            layer = twin.layer
            if layer.table is None:
                continue
            reports = layer_memory(0, layer)
            assert [report.device for report in reports] == [part.location.name for part in layer.parts]
            for number, (report, table) in enumerate(zip(reports, layer.store.tables(), strict=True)):
                live = live_bytes(storages(layer.store, number))
                assert report.total == live + table.pools.host_bytes + table.host_bytes
            tokens = sum(report.tokens_stored for report in reports)
            distinct = sum(
                int(pool.count[pool.allocator.refcount > 0].sum())
                for table in layer.store.tables()
                for pool in table.pools.by_id().values()
            )
            assert tokens <= distinct
