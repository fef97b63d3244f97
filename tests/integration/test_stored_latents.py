"""Latents stored in place of the keys and values that a release of transformers caches, and what becomes of them."""

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.config import CODECS
from pikv_hf.integration.latent_attention import expands_latents
from pikv_hf.integration.latent_code import caches_expanded_latents

LATENT = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"]
SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
PROMPT, TURN = 40, 6

if any(expands_latents(type(module)) for module in FAMILIES["deepseek_v3"].build().modules()):
    pytest.skip("this transformers caches latents itself", allow_module_level=True)


@functools.cache
def model_of(name: str = "deepseek_v3") -> Any:
    return FAMILIES[name].build()


def ids(tokens: int, seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 190, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Any, cache: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the logits of a call, `(B, Q, V)`."""
    logits: torch.Tensor = model(tokens, **cache_argument(cache), **options).logits
    return logits


def filled(model: Any, name: str = "deepseek_v3", tokens: int = PROMPT, **options: Any) -> PiKVCache:
    placement = {} if FAMILIES[name].routed else {"placement": "hash"}
    cache = PiKVCache.for_model(model, **{**SMALL, **placement, **options})
    for new in (ids(tokens), *(ids(1, seed) for seed in range(3))):
        read(model, cache, new)
    return cache


def theirs(model: Any, tokens: int = PROMPT) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    detach(model)
    for new in (ids(tokens), *(ids(1, seed) for seed in range(3))):
        read(model, cache, new)
    attach(model, "hash")
    return cache


def heads(cache: PiKVCache) -> set[int]:
    """Return how many heads the layers store."""
    return {layer.store.heads for layer in cache.layers}


def assert_goes_on(model: Any, cache: Any, expected: Any, **options: Any) -> None:
    """Compare a later turn and single tokens on both caches."""
    for tokens in (ids(TURN, 9), ids(1, 10), ids(1, 11)):
        found, wanted = read(model, cache, tokens, **options), read(model, expected, tokens, **options)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", LATENT)
def test_keys_and_values_read_as_those_of_dynamic_cache(name: str) -> None:
    model = model_of(name)
    cache, expected = filled(model, name), theirs(model)
    assert heads(cache) == {1}
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=0)
        assert layer.stored_mask().shape == other.keys.shape[:3]
        for ours, dense in zip(layer.dense(), (other.keys, other.values), strict=True):
            torch.testing.assert_close(ours, dense, atol=1e-4, rtol=0)
    # Reading changes nothing.
    assert heads(cache) == {1}
    copied = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys, layer.values, index)
    assert_goes_on(model, copied, copy.deepcopy(expected))
    assert_goes_on(model, cache, expected)


def assign_by_head(model: Any, cache: Any) -> None:
    """Keep other tokens in each head, as kvpress does."""
    for layer in cache.layers:
        order = torch.rand(layer.keys.shape[:3], generator=torch.Generator().manual_seed(3)).argsort(-1)
        kept = order[..., :20].sort(dim=-1).values[..., None]
        keys, values = (x.gather(2, kept.expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values))
        layer.keys, layer.values = keys, values


def go_eager(model: Any, cache: Any) -> None:
    if isinstance(cache, PiKVCache):
        model.set_attn_implementation("eager")


def go_detached(model: Any, cache: Any) -> None:
    if isinstance(cache, PiKVCache):
        detach(model)


def update_from_outside(model: Any, cache: Any) -> None:
    for index, layer in enumerate(cache.layers):
        torch.manual_seed(index)
        heads, dims = layer.keys.shape[1], (layer.keys.shape[-1], layer.values.shape[-1])
        cache.update(*(torch.randn(2, heads, 5, dim) for dim in dims), index)


def wrap_update(model: Any, cache: Any) -> None:
    """Have K/V change on their way to the cache."""
    update = cache.update
    cache.update = lambda keys, values, *args, **kwargs: update(keys * 0.9, values.round(decimals=2), *args, **kwargs)


def replace_projections(model: Any, cache: Any) -> None:
    """Have later tokens come of other projections; those that are there stay what they are."""
    if not isinstance(cache, PiKVCache):
        return
    for module in model.modules():
        if caches_expanded_latents(type(module)):
            torch.manual_seed(5)
            module.kv_b_proj = nn.Linear(module.kv_b_proj.in_features, module.kv_b_proj.out_features, bias=False)
    attach(model, "hash")


def hook_projections(model: Any, cache: Any) -> None:
    if isinstance(cache, PiKVCache):
        for module in model.modules():
            if caches_expanded_latents(type(module)):
                module.kv_b_proj.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [go_eager, go_detached, update_from_outside, wrap_update, hook_projections, replace_projections],
)
@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_what_latents_cannot_do_is_done_expanded(name: str, change: Callable[[Any, Any], None]) -> None:
    model = FAMILIES[name].build()
    expected, cache = theirs(model), filled(model, name)
    # As a wrapper of theirs, whose caches go on, would keep them.
    kept = [module.kv_b_proj for module in model.modules() if caches_expanded_latents(type(module))]
    for each in (expected, cache):
        change(model, each)
    assert_goes_on(model, cache, expected)
    assert heads(cache) == {FAMILIES[name].build().config.num_attention_heads}
    assert len(kept) == len(cache.layers)
    detach(model)


def test_other_tokens_assigned_to_each_head() -> None:
    model = model_of()
    cache, expected = filled(model), PiKVCache.from_cache(model, theirs(model), **SMALL)
    assert (heads(cache), heads(expected)) == ({1}, {4})
    for each in (cache, expected):
        assign_by_head(model, each)
    assert heads(cache) == {4}
    # Of keys that were picked the positions are known.
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert (layer.state.seen, layer.state.dropped) == (other.state.seen, other.state.dropped) == (20, PROMPT - 17)
    assert_goes_on(model, cache, expected)


def test_a_slice_of_what_was_read_is_a_crop() -> None:
    model = model_of()
    cache, expected = filled(model), theirs(model)
    expected.crop(PROMPT)
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        layer.keys, layer.values = keys[:, :, :PROMPT], values[:, :, :PROMPT]
    assert heads(cache) == {1}
    assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("pending", [False, True])
def test_heads_keep_tokens_of_their_own(pending: bool) -> None:
    model = model_of()
    cache = filled(model)
    expected = PiKVCache.from_cache(model, theirs(model), **SMALL)
    assert heads(expected) == {model.config.num_attention_heads}
    if pending:
        for each in (cache, expected):
            read(model, each, ids(TURN, 4))
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        kept = torch.rand(other.stored_mask().shape, generator=torch.Generator().manual_seed(2)) < 0.6
        with pytest.raises(ValueError, match=r"expected \(batch, heads, tokens\)"):
            layer.keep(kept[:, :1])
        assert layer.store.heads == 1
        layer.keep(kept)
        other.keep(kept)
    assert heads(cache) == {model.config.num_attention_heads}
    assert_goes_on(model, cache, expected)


def test_padding_and_evicted_tokens_stay_what_they_are() -> None:
    model = model_of()
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :7] = 0
    cache, expected = PiKVCache.for_model(model, **SMALL), DynamicCache(config=model.config)
    for each in (cache, expected):
        read(model, each, ids(PROMPT), attention_mask=mask)
    layer = cache.layers[1]
    before = layer.stored_mask()
    assert not before[0, :, :7].any()
    assert before.sum() == 4 * (2 * PROMPT - 7)
    layer.edits.latents.expand()
    assert torch.equal(layer.stored_mask(), before)
    assert not layer.keys[0, :, :7].any()
    for tokens in (TURN, 1):
        mask = nn.functional.pad(mask, (0, tokens), value=1)
        logits = [read(model, each, ids(tokens, 5), attention_mask=mask) for each in (cache, expected)]
        torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("codec", [name for name in CODECS if name not in ("none", "auto")])
def test_attention_over_coded_latents_is_that_over_what_they_decode_to(codec: str) -> None:
    model = model_of()
    cache = filled(model, tokens=150, key_codec=codec, value_codec=codec, placement="hash", rank=4)
    exact = theirs(model, 150)
    for tokens in (ids(1, 9), ids(1, 10), ids(70, 11), ids(1, 12)):
        decoded = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            layer.settle()
            decoded.update(layer.keys, layer.values, index)
        found, wanted, lossless = (read(model, each, tokens)[:, -1] for each in (cache, decoded, exact))
        assert (wanted - lossless).abs().max() > 1e-2, "nothing was lost, so nothing was tested"
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert heads(cache) == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"tiers": {"cpu": "4 MiB"}},
        {"tiers": {"cpu": "512 KiB", "disk": "4 MiB"}, "budget": "640 KiB"},
        {"budget": "8 MiB"},
        {"budget": "8 MiB", "scheduler": "ada_kv"},
        {"placement": "balanced"},
        {"devices": ["cpu:0", "cpu:1"]},
        {"devices": ["cpu:0", "cpu:1"], "budget": "8 MiB"},
    ],
    ids=str,
)
def test_layers_are_expanded_under_all_options(options: dict[str, Any]) -> None:
    model = model_of()
    expected, cache = theirs(model, 300), filled(model, tokens=300, **options)
    assert heads(cache) == {1}
    read(model, cache, ids(TURN, 8))
    read(model, expected, ids(TURN, 8))
    before = cache.nbytes
    for layer in cache.layers:
        layer.edits.latents.expand()
    assert heads(cache) == {4}
    assert cache.nbytes > before or "tiers" in options
    assert_goes_on(model, cache, expected)
    cache.crop(60)
    detach(model)
    expected.crop(60)
    attach(model, "hash")
    assert_goes_on(model, cache, expected)


def test_a_budget_is_kept_by_what_is_expanded() -> None:
    model = model_of()
    cache = filled(model, tokens=200, budget="512 KiB")
    assert heads(cache) == {1}
    assert not any(layer.state.evicted for layer in cache.layers)
    for layer in cache.layers:
        layer.edits.latents.expand()
    read(model, cache, ids(1, 3))
    assert cache.nbytes <= 512 * 1024
    assert all(layer.state.evicted for layer in cache.layers)


def test_forks_part_where_one_is_expanded() -> None:
    model = model_of()
    cache, expected = filled(model), theirs(model)
    twin = cache.fork()
    for layer in twin.layers:
        layer.edits.latents.expand()
    assert (heads(cache), heads(twin)) == ({1}, {4})
    assert_goes_on(model, twin, copy.deepcopy(expected))
    assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("expanded", [False, True])
def test_files_hold_what_the_cache_does(expanded: bool, tmp_path: Path) -> None:
    model = model_of()
    expected = theirs(model)
    cache = PiKVCache.from_cache(model, expected, **SMALL) if expanded else filled(model)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert heads(loaded) == heads(cache) == {4 if expanded else 1}
    for layer, other in zip(loaded.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=0)
    assert_goes_on(model, loaded, expected)
    assert heads(loaded) == {4 if expanded else 1}


def test_an_empty_layer_holds_latents_again() -> None:
    model = model_of()
    cache = PiKVCache.from_cache(model, theirs(model), **SMALL)
    cache.reset()
    expected = DynamicCache(config=model.config)
    for each in (cache, expected):
        read(model, each, ids(PROMPT))
    assert heads(cache) == {1}
    assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("routing", ["page_bound", "hierarchical"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_routing_goes_on_where_latents_do_not(routing: str, codec: str) -> None:
    model = model_of()
    options: dict[str, Any] = {"routing": routing, "max_pages": 1.0, "coverage": 1.0, "key_codec": codec}
    cache, expected = filled(model, tokens=120, **options), theirs(model, 120)
    assert heads(cache) == {1}
    if codec == "none":
        assert_goes_on(model, cache, expected)
    # What another than the model's attention brings is keys and values, and so are all from then on.
    detach(model)
    for each in (cache, expected):
        read(model, each, ids(3, 20))
    attach(model, "hash")
    assert heads(cache) == {4}
    if codec == "none":
        assert_goes_on(model, cache, expected)
    else:
        assert not read(model, cache, ids(1, 10)).isnan().any()
    assert cache.stats().read_share == 1


def test_autocast_stores_latents_rounded_as_keys_are() -> None:
    model = FAMILIES["deepseek_v3"].build()
    with torch.autocast("cpu", torch.bfloat16):
        expected, cache = theirs(model), filled(model)
        keys = [(layer.keys, other.keys) for layer, other in zip(cache.layers, expected.layers, strict=True)]
    assert heads(cache) == {1}
    assert {layer.store.dtype for layer in cache.layers} == {torch.bfloat16}
    # In the first layer, before roundings of attention add up.
    torch.testing.assert_close(keys[0][0], keys[0][1].to(torch.bfloat16), atol=0, rtol=0)


def test_projections_outlive_the_model_for_the_cache() -> None:
    model = FAMILIES["deepseek_v3"].build()
    cache, expected = filled(model), theirs(model)
    replace_projections(model, cache)
    gc.collect()
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-3, rtol=0)
    assert not read(model, cache, ids(1, 10)).isnan().any()
    assert heads(cache) == {4}
    # A new cache has latents of the new projections.
    cache = filled(model)
    assert heads(cache) == {1}
    del model
    gc.collect()
    assert cache.layers[0].keys.shape[1] == 4


@torch.no_grad()
def test_weights_that_were_written_to_are_refused() -> None:
    model = FAMILIES["deepseek_v3"].build()
    cache = filled(model)
    projection = next(m.kv_b_proj for m in model.modules() if caches_expanded_latents(type(m)))
    projection.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights of kv_b_proj have changed"):
        read(model, cache, ids(1, 10))
    with pytest.raises(RuntimeError, match="weights of kv_b_proj have changed"):
        cache.layers[0].keys  # noqa: B018
    cache.reset()
    assert_goes_on(model, cache, DynamicCache(config=model.config))


def test_of_a_single_head_no_latents_are_stored() -> None:
    """Latents of one head with as many channels could not be told from keys."""
    model = FAMILIES["deepseek_v3"].build(num_attention_heads=1, num_key_value_heads=1)
    expected, cache = theirs(model), filled(model)
    assert {layer.store.kv_format().shape[1:] for layer in cache.layers} == {(1, 24 + 8, 16)}
    assert_goes_on(model, cache, expected)
