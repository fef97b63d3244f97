"""Bounds of latents have those of their rotary keys beside them, which together bound every logit."""

import importlib.util
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from latent_layers import LATENT, ROTARY, SCALE, grow, grown, make_layer, new_queries, pages_of

from pikv_hf.attention.attention_call import AttentionCall
from pikv_hf.attention.paged_attention import attend_pages
from pikv_hf.common.tensors import live_bytes
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.pages.page_pool import PagePool

CODECS = ("none", "int8", "int4", "fp8", "lowrank")
POLICIES = ("page_bound", "expert_topk", "cache_aware", "adaptive", "hierarchical")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    codecs=st.tuples(st.sampled_from(CODECS), st.sampled_from(CODECS)),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    tiers=st.booleans(),
    crop=st.integers(0, 30),
)
def test_bounds_bound_every_logit(seed: int, codecs: tuple[str, str], size: float, tiers: bool, crop: int) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"tiers": {"cpu": "1 MiB"}} if tiers else {}
    layer = grown(key_codec=codecs[0], value_codec=codecs[1], rank=3, size=size, routing="page_bound", **options)
    _check_bounds(layer)
    twin = layer.fork()
    if crop:
        layer.crop(layer.seen - crop)
        _check_bounds(layer)
        grow(layer, torch.randn(2, 1, 20, LATENT) * 3 * size, torch.randn(2, 1, 20, ROTARY) * 3 * size)
        _check_bounds(layer)
    _check_bounds(twin)


def _check_bounds(layer: PiKVLayer) -> None:
    assert layer.table is not None
    query = new_queries(2)[:, :, 0]
    bounds = layer.table.view.full_pages().bounds(query).double()
    middle, half = (each.double() for each in layer.table.view.full_pages().ranges(query))
    for row in range(2):
        own = query[row].double()
        for column, keys, misses in pages_of(layer, row):
            logits, slack = own @ keys.T, own.abs() @ misses
            rounding = 1e-5 * (own.abs() @ keys.abs().T).amax(dim=1)
            assert bounds[0, row, column] >= (logits.amax(dim=1) - slack - rounding).max()
            assert bool(((middle + half)[0, :, row, column] >= logits.amax(dim=1) - slack - rounding).all())
            assert bool(((middle - half)[0, :, row, column] <= logits.amin(dim=1) + slack + rounding).all())
            if not misses.any():
                ends = torch.maximum(own * keys.amin(dim=0), own * keys.amax(dim=0)).sum(dim=1)
                torch.testing.assert_close(bounds[0, row, column], ends.max(), rtol=1e-5, atol=1e-5)


def _routed(layer: PiKVLayer, query: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the output of a step, and the share of the full pages that it read."""
    part = layer.parts[0]
    assert part.table is not None
    assert part.page_router is not None
    index, counts = part.table.view.full_pages(), part.page_router.counts
    before = int(counts.read), counts.reachable
    call = AttentionCall(SCALE, None, layer.seen, part.page_router, None, True)
    out, _ = attend_pages(part.table, query, None, call)
    always = counts.reachable - before[1] - index.page_count
    return out, (int(counts.read) - before[0] - always) / index.page_count


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("name", POLICIES)
def test_routed_steps(name: str, codec: str) -> None:
    outs, query = {}, None
    for share in (1.0, 0.5, 0.25):
        torch.manual_seed(0)
        layer = grown(key_codec=codec, routing=name, max_pages=share, coverage=1.0)
        query = new_queries(2) if query is None else query
        outs[share], read = _routed(layer, query)
        assert read <= share + 0.1
        call = AttentionCall(SCALE, None, layer.seen, None, None, True)
        assert layer.table is not None
        every, _ = attend_pages(layer.table, query, None, call)
        # A choice of all pages adds up the same in another order.
        assert torch.allclose(outs[share], every, atol=1e-5) == (share == 1 or read == 1)


@pytest.mark.parametrize("name", ["page_bound", "cache_aware", "adaptive"])
def test_pages_are_told_apart_by_their_rotary_parts(name: str) -> None:
    """All latents are alike: only rotary parts say that one page takes nearly all the attention."""
    torch.manual_seed(0)
    layer = make_layer(routing=name, max_pages=1, num_shards=1)
    latents, rotary = torch.ones(1, 1, 61, LATENT), torch.randn(1, 1, 61, ROTARY)
    rotary[:, :, 20:24] = 40.0
    latents[:, :, 20:24] = 0.5
    grow(layer, latents, rotary)
    query = torch.ones(1, 5, 1, LATENT + ROTARY)
    out, read = _routed(layer, query)
    assert 0 < read < 0.2
    torch.testing.assert_close(out, torch.full_like(out, 0.5), atol=1e-4, rtol=0)


def test_a_budget_keeps_what_rotary_parts_say() -> None:
    torch.manual_seed(0)
    layers = {}
    for sign in (1.0, -1.0):
        layer = make_layer(budget=32, scheduler="quest", num_shards=1, recent_window=4)
        latents, rotary = torch.ones(1, 1, 60, LATENT), torch.zeros(1, 1, 60, ROTARY)
        rotary[:, :, 20:24] = 9.0 * sign
        for start in range(0, 60, 20):
            part = slice(start, start + 20)
            grow(layer, latents[:, :, part], rotary[:, :, part], torch.ones(1, 5, 20, LATENT + ROTARY))
        assert layer.parts[0].scheduler is not None
        assert layer.parts[0].scheduler.pages_evicted
        layers[sign] = layer.stored_mask()[0, 0, 20:24].tolist()
    assert layers == {1.0: [True] * 4, -1.0: [False] * 4}


@pytest.mark.parametrize(("codec", "kept"), [("none", LATENT + ROTARY), ("fp8", LATENT + ROTARY), ("int8", ROTARY)])
@pytest.mark.parametrize("tiers", [False, True])
def test_bytes_of_bounds_are_reported(codec: str, kept: int, tiers: bool) -> None:
    options: dict[str, Any] = {"tiers": {"cpu": "1 MiB"}} if tiers else {}
    sizes = {}
    for name in ("all", "page_bound"):
        torch.manual_seed(0)
        layer = grown(
            key_codec=codec, value_codec=codec, routing=name, **({"max_pages": 3} if name != "all" else {}), **options
        )
        assert layer.table is not None
        if name != "all":
            layer.table.view.full_pages().bounds(new_queries(2)[:, :, 0])
        sizes[name] = {pool_id: _beside(pool) for pool_id, pool in layer.table.pools.by_id().items()}
    for pool_id, pool in layer.table.pools.by_id().items():
        channels = LATENT + ROTARY if pool_id.name == "plain" else kept
        told = 3 * LATENT if tiers and pool_id.name.startswith("int8") else 0
        assert sizes["all"][pool_id] == 0
        assert sizes["page_bound"][pool_id] == pool.capacity * (2 * channels * 4 + told)
        assert live_bytes(pool.tensors()) >= sizes["page_bound"][pool_id]


def _beside(pool: PagePool) -> int:
    kept = [bounds for bounds in (pool.bounds, pool.rotary_bounds) if bounds is not None]
    return live_bytes([each for bounds in kept for each in bounds.tensors()])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_in_the_interpreter(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, query = grown(key_codec=codec, routing="page_bound", max_pages=0.5), new_queries(2)
    expected, _ = _routed(layer, query)
    monkeypatch.setenv("PIKV_KERNELS", "interpret")
    out, _ = _routed(layer, query)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
