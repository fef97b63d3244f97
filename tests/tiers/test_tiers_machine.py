"""The random operations of the other machines, on layers most of whose pages are not in fast memory."""

import gc
from typing import Any

import numpy as np
import pytest
from eviction_machine import EvictionMachine
from fake_attachment import HEADS, KEY_DIM, VALUE_DIM
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from layer_machine import CODECS, LayerMachine

from pikv_hf.common.tensors import live_bytes

pytestmark = pytest.mark.slow

# Bytes of a token in a page of float32.
TOKEN = HEADS * (KEY_DIM + VALUE_DIM) * 4


def limits(codecs: set[str], page_size: int, levels: str, evicts: bool = False) -> dict[str, int | None]:
    """Return tiers with room for few pages in the fastest, and fewer in the next; each pool needs room for two."""
    frames = 4 if codecs == {"none"} else 80 if "auto" in codecs else 20
    fast = (frames + 24 * evicts) * TOKEN * page_size
    return {"two": {"cpu": fast, "disk": None}, "three": {"device": fast, "cpu": fast // 2, "disk": None}}[levels]


class Tiered:
    """What is true of tiers after every step."""

    twins: list[Any]

    @rule(which=st.integers(0, 9), seed=st.integers(0, 99))
    def fetch(self, which: int, seed: int) -> None:
        """Routing asks for pages ahead of need, and then for these or others."""
        twin = self.twins[which % len(self.twins)]
        random = np.random.default_rng(seed)
        for name, pool in {} if twin.layer.table is None else twin.layer.table.pools.packed.items():
            if len(ids := twin.layer.table.distinct_pages(name)):
                pool.prefetch(ahead := random.choice(ids, min(3, len(ids)), replace=False))
                chosen = pool.index(np.append(ahead[1:], random.choice(ids, 4))[: pool.frames.most])
                # Before the tensors are looked at: fetching may replace them by longer ones.
                frames = pool.fetch(chosen)
                codes = [part.index_select(1, frames) for part in pool.token_tensors()]
                copies = [part for each in pool.codes_at(chosen) for part in each.tensors()]
                assert all(bool((a == b).all()) for a, b in zip(codes, copies, strict=True))

    @invariant()
    def limits_hold(self) -> None:
        layers = {id(twin.layer.parts[0].tiers): twin.layer.parts[0].tiers for twin in getattr(self, "twins", [])}
        for tiers in layers.values():
            pools = tiers.pools
            fast = live_bytes(tensor for pool in pools for tensor in pool.token_tensors())
            assert fast == tiers.bytes_used(tiers.fast) <= tiers.limit(tiers.fast)
            if "cpu" in tiers.names[1:]:
                assert tiers.bytes_used("cpu") <= tiers.limit("cpu")
            for pool in pools:
                used = np.flatnonzero(pool.allocator.refcount)
                assert sum(pool.pages_by_tier().values()) == len(used), "a page is nowhere"
                resident = np.flatnonzero(pool.frames.frame_of >= 0)
                assert (pool.frames.page_of[pool.frames.frame_of[resident]] == resident).all()
                assert np.count_nonzero(pool.frames.page_of >= 0) == len(resident)
                assert not pool._leaving.any()
                gone = set(np.flatnonzero(pool.allocator.refcount == 0).tolist())
                assert not gone & set(pool.lower.pages().tolist()), "memory of a page that is gone"


class TieredLayerMachine(Tiered, LayerMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4]),
        recent_window=st.sampled_from([0, 2, 5]),
        sink_tokens=st.sampled_from([0, 1, 4]),
        num_shards=st.sampled_from([1, 3]),
        batch=st.integers(1, 3),
        codecs=st.sampled_from([("none", "none"), *CODECS]),
        levels=st.sampled_from(["two", "three"]),
        seed=st.integers(0, 2**16),
    )
    def start(self, levels: str, page_size: int, codecs: tuple[str, str], **options: Any) -> None:
        tiers = limits(set(codecs), page_size, levels)
        LayerMachine.start(self, codecs=codecs, page_size=page_size, tiers=tiers, **options)

    @rule(which=st.integers(0, 9), new=st.integers(20, 60))
    def prompt(self, which: int, new: int) -> None:
        self.append(which=which, new=new, padding=False, identical=False)


class TieredEvictionMachine(Tiered, EvictionMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 4]),
        recent_window=st.sampled_from([0, 2, 5]),
        sink_tokens=st.sampled_from([0, 1, 4]),
        num_shards=st.sampled_from([1, 3]),
        batch=st.integers(1, 3),
        codec=st.sampled_from(["none", "none", "int8", "int4", "fp8", "auto", "lowrank"]),
        levels=st.sampled_from(["two", "three"]),
        seed=st.integers(0, 2**16),
    )
    def start(self, levels: str, page_size: int, codec: str, **options: Any) -> None:
        tiers = limits({codec}, page_size, levels, evicts=True)
        EvictionMachine.start(self, page_size=page_size, codec=codec, tiers=tiers, **options)

    @rule(which=st.integers(0, 9), new=st.integers(20, 60))
    def prompt(self, which: int, new: int) -> None:
        self.append(which=which, new=new, identical=False, held=False)

    def teardown(self) -> None:
        self.twins = []
        gc.collect()


TieredLayerMachine.TestCase.settings = settings(max_examples=14, stateful_step_count=20)
TieredEvictionMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=15)
TestTieredLayers = TieredLayerMachine.TestCase
TestTieredEviction = TieredEvictionMachine.TestCase
