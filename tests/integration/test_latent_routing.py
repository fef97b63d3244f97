"""Routing and budgets of models whose caches hold latents: exact where everything is read, fewer pages where not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import LATENT, ids, model_of, new_cache, read
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.config import ROUTINGS
from pikv_hf.pages.key_bounds import KeyBounds

POLICIES = [name for name in ROUTINGS if name != "all"]
CODED: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8, rotary wide": {"key_codec": "int8"},
    "int8": {"key_codec": "int8", "value_codec": "int8"},
    "int8 in tiers": {"key_codec": "int8", "value_codec": "int8", "tiers": {"cpu": "1 MiB"}},
    "fp8": {"key_codec": "fp8", "value_codec": "fp8"},
}


def shares_read(cache: PiKVCache) -> float:
    share = cache.stats().read_share
    assert share is not None
    return share


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("routing", POLICIES)
@torch.no_grad()
def test_everything_chosen_is_exact(name: str, routing: str) -> None:
    cache = new_cache(name, routing=routing, max_pages=1.0, coverage=1.0)
    few = new_cache(name, routing=routing, max_pages=0.25)
    theirs = DynamicCache(config=model_of(name).config)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[0, :7] = 0
    for number, tokens in enumerate((ids(2, 120), *(ids(2, 1, seed) for seed in range(4)))):
        mask = mask if not number else torch.nn.functional.pad(mask, (0, 1), value=1)
        ours, expected, other = (read(name, each, tokens, mask)[:, -1] for each in (cache, theirs, few))
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    assert shares_read(cache) == 1
    assert shares_read(few) < 0.7
    assert not torch.allclose(other, expected, atol=1e-3)
    assert not cache.stats().dense_layers


@pytest.mark.parametrize("kind", CODED)
@torch.no_grad()
def test_bounds_are_saved_and_forked(kind: str, tmp_path: Path) -> None:
    name, options = "deepseek_v3", {"routing": "page_bound", "max_pages": 0.25, **CODED[kind]}
    cache = new_cache(name, **options)
    for tokens in (ids(2, 120), ids(2, 1), ids(2, 1, 1)):
        read(name, cache, tokens)
    cache.save(tmp_path / "cache")
    loaded, twin = PiKVCache.load(tmp_path / "cache", model_of(name)), cache.fork()
    known = 0
    for layer, other in zip(cache.layers, loaded.layers, strict=True):
        for here, there in zip(layer.table.pools.by_id().values(), other.table.pools.by_id().values(), strict=True):
            for ours, restored in ((here.bounds, there.bounds), (here.rotary_bounds, there.rotary_bounds)):
                assert type(ours) is type(restored)
                # What follows from codes is found again.
                if type(ours) is KeyBounds:
                    assert restored.known.sum() == ours.known[here.allocator.refcount > 0].sum()
                    known += restored.known.sum()
    assert known
    for seed in range(3):
        logits = [read(name, each, ids(2, 1, seed + 5)) for each in (cache, loaded, twin)]
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[2], logits[0], atol=1e-4, rtol=0)
    assert shares_read(loaded) < 0.7


@torch.no_grad()
def test_a_saved_cache_may_begin_to_route(tmp_path: Path) -> None:
    cache = new_cache("deepseek_v3", key_codec="int8")
    read("deepseek_v3", cache, ids(1, 120))
    cache.save(tmp_path / "cache")
    routed = PiKVCache.load(tmp_path / "cache", model_of("deepseek_v3"), routing="page_bound", max_pages=1.0)
    few = PiKVCache.load(tmp_path / "cache", model_of("deepseek_v3"), routing="page_bound", max_pages=2)
    logits = [read("deepseek_v3", each, ids(1, 1, 3)) for each in (cache, routed, few)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert shares_read(few) < 0.8


@pytest.mark.parametrize("scheduler", ["quest", "pikv", "h2o"])
@pytest.mark.parametrize("budget", ["64 KiB", 64])
@torch.no_grad()
def test_budgets(scheduler: str, budget: str | int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheduler": scheduler, "budget": budget, "recent_window": 8, "num_shards": 1}
    cache = new_cache("deepseek_v3", **options, routing="page_bound", max_pages=0.5)
    read("deepseek_v3", cache, ids(1, 150))
    for seed in range(20):
        read("deepseek_v3", cache, ids(1, 1, seed))
        if isinstance(budget, str):
            assert cache.memory_report().total <= 64 * 1024
    assert sum(part.scheduler.pages_evicted for layer in cache.layers for part in layer.parts)
    if not isinstance(budget, str):
        # A loaded cache looks at once whether pages have to go, the saved one at the end of a page.
        return
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model_of("deepseek_v3"))
    for seed in range(20, 30):
        logits = [read("deepseek_v3", each, ids(1, 1, seed)) for each in (cache, loaded)]
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
