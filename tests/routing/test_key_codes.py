"""The 2-bit codes of keys that routing by masses reads are those of what a page holds, whatever happened to it."""

from pathlib import Path
from typing import Any

import pytest
import routing_reference as slow
import torch
from fake_attachment import HEADS
from families import FAMILIES, prompts
from routing_reference import choose, chosen, full_pages, grow, grown
from routing_runs import SMALL, generate, queries

from pikv_hf import PiKVCache
from pikv_hf.common.kv import KV
from pikv_hf.config import CODECS
from pikv_hf.kernels import decode_pages, encode_pages
from pikv_hf.kernels.page_codes import PageCodes
from pikv_hf.layer.layer import PiKVLayer

ROUTED: dict[str, Any] = {"routing": "page_mass", "max_pages": 3}


@pytest.mark.parametrize("codec", CODECS)
def test_codes_are_of_the_keys_that_pages_hold(codec: str) -> None:
    """After cropping, growing anew in the pages given back, forking and writing to shared pages."""
    layer = grown(prompt=130, batch=2, key_codec=codec, value_codec="none", rank=4, **ROUTED)
    for each in _lives(layer):
        assert_codes_are_of_keys(each)
        query = queries(each)
        choice = choose(each, query)
        for row in range(2):
            pages = [page for page in full_pages(each, row) if not slow.is_protected(each, page)]
            for head in range(HEADS):
                mine = chosen(each, choice, row, head) & {page.where for page in pages}
                own = slow.queries_of(each, query, row, head)
                shares = slow.shares_by_codes(pages, head, own, each.config.page_size)
                read = [share for page, share in zip(pages, shares, strict=True) if page.where in mine]
                assert sorted(read) == pytest.approx(sorted(shares)[-3:], rel=1e-4)


def _lives(layer: PiKVLayer) -> Any:
    """Yield the layer and forks of it at several points of their lives, codes having been made at each of them."""
    query = queries(layer)
    choose(layer, query)
    twin = layer.fork()
    yield layer
    layer.crop(97)
    choose(layer, query)
    yield layer
    for _ in range(40):
        grow(layer, 1, scale=3.0)
        choose(layer, query)
    yield layer
    yield twin
    twin.batch_select_indices(torch.tensor([1, 0]))
    layer.reset()
    for _ in range(30):
        grow(twin, 1, scale=0.3)
    yield twin


def assert_codes_are_of_keys(layer: PiKVLayer) -> None:
    assert layer.table is not None
    found = 0
    for pool_id, pool in layer.table.pools.by_id().items():
        for row in layer.table.rows:
            ids = row.full_pages(pool_id)
            codes = pool.key_codes(ids)
            for page in ids.tolist():
                index, count = torch.tensor([page]), int(pool.count[page])
                keys = pool.decoded(index, KV.KEYS).unflatten(1, (1, -1))[:, :, :count]
                filled = torch.cat([keys, keys[:, :, :1].expand(-1, -1, pool.page_size - count, -1)], dim=2)
                expected = _tokens(encode_pages(filled, "int2", keys=True))
                torch.testing.assert_close(_tokens(codes.pick(index)), expected, atol=1e-5, rtol=1e-5)
                found += 1
    assert found > 20


def _tokens(codes: PageCodes) -> torch.Tensor:
    return decode_pages(codes, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"key_codec": "int4"}, {"tiers": {"cpu": "24KiB", "disk": None}}])
@torch.no_grad()
def test_a_loaded_cache_makes_them_again(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = FAMILIES["qwen3_moe"].build(num_hidden_layers=2), prompts(1, 140)
    cache = PiKVCache.for_model(model, **SMALL, **ROUTED, **options)
    generate(model, inputs, cache)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert loaded.nbytes == cache.nbytes
    token = torch.ones(1, 1, dtype=torch.long)
    ours, theirs = (model(token, past_key_values=each).logits for each in (cache, loaded))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert loaded.stats().read_share < 0.8


@pytest.mark.slow
def test_tiers_choose_the_same_pages() -> None:
    model, inputs = FAMILIES["qwen3_moe"].build(num_hidden_layers=2), prompts(2, 140)
    plain = generate(model, inputs, PiKVCache.for_model(model, **SMALL, **ROUTED))
    cache = PiKVCache.for_model(model, **SMALL, **ROUTED, tiers={"cpu": "24KiB", "disk": None})
    assert torch.equal(generate(model, inputs, cache).sequences, plain.sequences)
    assert cache.tiers.counters.misses


@pytest.mark.slow
@torch.no_grad()
def test_codes_take_the_memory_they_are_said_to() -> None:
    """11.9% of keys and values in 16 bits at 16 tokens of 64 channels; here in 32 bits, of 16."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    inputs = prompts(1, 300)
    bytes_of = {}
    for routing in ("page_bound", "page_mass"):
        cache = PiKVCache.for_model(model, **{**SMALL, "page_size": 16}, routing=routing, max_pages=2)
        generate(model, inputs, cache)
        pool = cache.layers[0].table.plain
        bytes_of[routing] = pool.full_page_bytes - pool.page_bytes
        assert (pool.bounds is None) == (pool.codes is not None) == (routing == "page_mass")
    heads, dim = pool.keys.shape[0], pool.keys.shape[-1]
    of_page = heads * (16 * dim // 4 + 3 * dim + 4 * (2 + 8))
    assert bytes_of["page_mass"] - bytes_of["page_bound"] == of_page - heads * 2 * dim * 4
