"""Random operations on layers with a budget: it holds after each, and attention reads what is held."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from budget_runs import held_bytes
from budgeted_layer import budgeted_layer, shard_holdings
from eviction_machine import Twin, reference_attention
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pikv_hf.config import JOINT, SCHEDULERS, PiKVConfig
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.attend import attend
from pikv_hf.reports.memory_measure import layer_memory
from pikv_hf.scheduling.growth_limit import BudgetError

NAMES = ("keys", "values", "held", "packed")


class BudgetMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4, 8]),
        recent_window=st.sampled_from([0, 2, 5, 16]),
        sink_tokens=st.sampled_from([0, 1, 4]),
        num_shards=st.sampled_from([1, 3]),
        batch=st.integers(1, 3),
        codec=st.sampled_from(["none", "none", "int8", "int4", "fp8", "auto", "lowrank"]),
        scheduler=st.sampled_from([*SCHEDULERS, *4 * [JOINT]]),
        unit=st.sampled_from(["tokens", "tokens", "share", "bytes", "shard"]),
        room=st.integers(0, 30),
        seed=st.integers(0, 2**16),
    )
    def start(
        self, batch: int, codec: str, scheduler: str, unit: str, room: int, seed: int, page_size: int, **options: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        if scheduler == JOINT:
            codec, unit = "none", "share" if unit == "shard" else unit
        self.unit, size = unit, page_size
        sinks = -(-options["sink_tokens"] // size) * size
        self.least = sinks + options["recent_window"] + 2 * size
        # Of bytes: pages of two heads with what is kept beside them, for as many rows as there may ever be.
        page = HEADS * size * (KEY_DIM + VALUE_DIM) * 4 + size * 8 + 400
        most = 4 * (self.least // size + 8 + room) * page * (1 + (codec == "lowrank")) + 40_000
        self.limit = {"tokens": self.least + room, "share": 0.3 + room / 60, "bytes": most, "shard": size + room}[unit]
        self.config = PiKVConfig(
            key_codec=codec,
            value_codec=codec,
            rank=4,
            budget=f"{most}B" if unit == "bytes" else self.limit,
            budget_scope="shard" if unit == "shard" else None,
            scheduler=scheduler,
            page_size=size,
            **options,
        )
        none = torch.zeros(batch, HEADS, 0, dtype=torch.bool)
        empty = torch.zeros(*none.shape, KEY_DIM), torch.zeros(*none.shape, VALUE_DIM), none, none.clone()
        self.twins = [Twin(budgeted_layer(self.config), *empty)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def pick(self, index: int) -> Twin:
        return self.twins[index % len(self.twins)]

    def follow(self, twin: Twin) -> None:
        """Take what the layer holds: nothing that had gone before, and of what was there all that must stay."""
        held, columns = twin.layer.stored_mask(), torch.arange(twin.seen)
        assert not bool((held & ~twin.held).any()), "an evicted token is back"
        never = (columns < self.config.sink_tokens) | (columns >= twin.seen - self.config.recent_window)
        assert torch.equal(held[:, :, never], twin.held[:, :, never]), "a sink or a recent token was evicted"
        twin.held = held
        # Codecs change tokens once; that they do no more than that is the other machines' matter.
        twin.keys, twin.values = (part.clone() for part in twin.layer.dense())

    @contextlib.contextmanager
    def may_fail(self, twin: Twin, allowed: bool) -> Iterator[None]:
        """A budget that cannot be kept is said so, and everything is as it was."""
        before = twin.seen
        try:
            yield
        except BudgetError:
            assert allowed, "nothing was in the way of the budget"
            twin.layer.crop(before)
            assert twin.layer.get_seq_length() == before

    def forks(self, twin: Twin) -> int:
        """Return how many layers share the pages of this one."""
        return sum(t.layer.table.pools is twin.layer.table.pools for t in self.twins if t.layer.table is not None)

    @rule(which=st.integers(0, 9), new=st.sampled_from([1, 1, 1, 2, 5, 9, 30]), identical=st.booleans())
    def append(self, which: int, new: int, identical: bool) -> None:
        twin = self.pick(which)
        # A fork may hold on to all that this one could free.
        with self.may_fail(twin, self.unit == "bytes" and twin.layer.table is not None and self.forks(twin) > 1):
            self.read(twin, new, identical)
            self.within_budget(twin)

    def read(self, twin: Twin, new: int, identical: bool) -> None:
        batch = twin.held.shape[0]
        keys, values = self.random(batch, HEADS, new, KEY_DIM), self.random(batch, HEADS, new, VALUE_DIM)
        query = self.random(batch, HEADS * GROUPS, new, KEY_DIM)
        if identical:
            keys, values = keys[:1].expand_as(keys).contiguous(), values[:1].expand_as(values).contiguous()
        got = twin.layer.update(keys, values)
        old = {name: getattr(twin, name) for name in NAMES}
        there = torch.ones(batch, HEADS, new, dtype=torch.bool)
        twin.keys, twin.values = torch.cat([twin.keys, keys], 2), torch.cat([twin.values, values], 2)
        twin.held, twin.packed = torch.cat([twin.held, there], 2), torch.cat([twin.packed, ~there], 2)
        try:
            self.follow(twin)
            out, _ = pikv_attention_forward(ATTENTION, query, *got, None, scaling=SCALE)
            last = reference_attention(twin, query[:, :, -1])
            torch.testing.assert_close(out[:, -1].double(), last, atol=1e-5, rtol=1e-5)
            experts = torch.randint(0, EXPERTS, (1 if identical else batch, new), generator=self.generator)
            # What was decided together waits for no router.
            if new == 1 or twin.layer.pending is not None:
                twin.layer.record_experts(experts.expand(batch, new).reshape(-1))
        except BudgetError:
            for name, value in old.items():
                setattr(twin, name, value)
            raise
        self.follow(twin)

    def within_budget(self, twin: Twin) -> None:
        layer = twin.layer
        if self.unit == "bytes":
            assert sum(part.total for part in layer_memory(0, layer)) <= self.limit * self.forks(twin)
        elif self.unit == "shard":
            over = shard_holdings(layer) > self.limit
            assert not over.any() or self.kept_apart, "a shard holds more than its budget"
        elif self.config.scheduler == JOINT:
            for row in range(layer.batch):
                assert held_bytes(layer, row) <= self.most(twin) * HEADS * (KEY_DIM + VALUE_DIM) * 4
        else:
            most = self.most(twin)
            assert float(twin.held.sum(2).float().mean(1).max()) <= most

    def most(self, twin: Twin) -> float:
        return self.limit if self.unit == "tokens" else max(int(self.limit * twin.seen), self.least)

    kept_apart = False

    @rule(which=st.integers(0, 9), share=st.floats(0, 1), by_head=st.booleans())
    def keep(self, which: int, share: float, by_head: bool) -> None:
        twin = self.pick(which)
        if twin.layer.table is None:
            return
        shape = (*twin.held.shape[:1], HEADS if by_head else 1, twin.seen)
        kept = (torch.rand(shape, generator=self.generator) < share).expand_as(twin.held)
        # Pages are made anew, of tokens that may lie far apart: those with a sink or a recent token cannot go.
        with self.may_fail(twin, allowed=True):
            twin.layer.keep(kept)
            self.kept_apart = True
            twin.held = twin.held & kept
            self.follow(twin)
            self.within_budget(twin)

    @rule(which=st.integers(0, 9), share=st.floats(0, 1))
    def crop(self, which: int, share: float) -> None:
        twin = self.pick(which)
        length = int(twin.seen * share)
        twin.layer.truncate(length)
        twin.change(lambda part: part[:, :, :length])
        if twin.layer.table is not None:
            self.follow(twin)

    @precondition(lambda self: len(self.twins) < 3)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        twin = self.pick(which)
        layer = twin.layer.fork()
        if layer.table is not None:
            # What had left the window of the older one is packed first.
            self.follow(twin)
        self.twins.append(Twin(layer, **{name: getattr(twin, name).clone() for name in NAMES}))

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
        self.follow(twin)

    @invariant()
    def attention_reads_what_is_held(self) -> None:
        for twin in getattr(self, "twins", []):
            assert twin.layer.get_seq_length() == twin.seen
            if twin.layer.table is None or not twin.seen:
                continue
            assert torch.equal(twin.layer.stored_mask(), twin.held)
            query = self.random(len(twin.held), HEADS * GROUPS, 1, KEY_DIM)
            out, _ = attend(twin.layer, query, scale=SCALE)
            expected = reference_attention(twin, query[:, :, 0])
            torch.testing.assert_close(out[:, :, 0].double(), expected, atol=1e-5, rtol=1e-5)

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
            assert pool.usage is not None
            assert pool.usage.shares.shape[1] == pool.usage.steps.shape[1] == pool.capacity
            assert bool((pool.usage.shares >= 0).all())
