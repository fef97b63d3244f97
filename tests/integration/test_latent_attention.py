"""Latent attention (MLA) where transformers caches latents: read in place, with the projections in the queries."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import LATENT, SMALL, attention_of, caches_latents, ids, model_of, needs_latents, new_cache, read
from torch import nn
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model
from pikv_hf.integration import attention_function, expanded_history
from pikv_hf.integration.latent_attention import absorbed_queries, absorbs, expanded_outputs


@needs_latents
@pytest.mark.parametrize("name", LATENT)
def test_absorbed_attention_is_that_of_expanded_tokens(name: str) -> None:
    module: Any = attention_of(tiny_model(name))[0]
    assert absorbs(module)
    heads = module.kv_b_proj.out_features // (module.qk_nope_head_dim + module.v_head_dim)
    torch.manual_seed(0)
    query = torch.randn(2, heads, 3, module.qk_nope_head_dim + module.qk_rope_head_dim)
    latents, rotary = torch.randn(2, 1, 7, module.kv_lora_rank), torch.randn(2, 1, 7, module.qk_rope_head_dim)
    with torch.no_grad():
        keys, values = module.expand_kv(latents, rotary)
        expected = (query @ keys.transpose(-1, -2)).softmax(-1) @ values
        shares = (absorbed_queries(module, query) @ torch.cat([latents, rotary], -1).transpose(-1, -2)).softmax(-1)
        out = expanded_outputs(module, (shares @ latents).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@needs_latents
def test_what_is_added_to_the_projection_is_not_absorbed() -> None:
    module: Any = attention_of(tiny_model("deepseek_v3"))[0]
    assert absorbs(module)
    handle = module.kv_b_proj.register_forward_hook(lambda *_: None)
    assert not absorbs(module)
    handle.remove()

    class Adapted(nn.Linear):
        """As an adapter wraps or replaces a layer."""

    kept, module.kv_b_proj = module.kv_b_proj, Adapted(*module.kv_b_proj.weight.shape[::-1], bias=False)
    assert not absorbs(module)
    module.kv_b_proj = kept
    assert absorbs(module)
    assert not absorbs(module.to("meta"))


#: No model ends by itself: the end is a token that there is none of.
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 13},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generates_as_with_dynamic_cache(name: str, strategy: str) -> None:
    model, options = model_of(name), {**GREEDY, **STRATEGIES[strategy]}
    rows = 1 if strategy == "lookup" else 3
    prompt = ids(rows, 45)
    mask = torch.ones_like(prompt)
    mask[rows // 2, : 9 * (rows > 1)] = 0
    detach(model)
    expected = model.generate(
        prompt, attention_mask=mask, **options, **cache_argument(DynamicCache(config=model.config))
    )
    cache = new_cache(name)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **options, **cache_argument(cache)), expected)
    assert not cache.stats().dense_layers


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-3),
        ({"tiers": {"cpu": "1 MiB"}}, 1e-3),
        ({"budget": "1 MiB"}, 1e-3),
        ({"placement": "balanced"}, 1e-3),
        ({"key_codec": "int8", "value_codec": "int8"}, 0.05),
        ({"key_codec": "int8", "tiers": {"cpu": "1 MiB"}}, 0.05),
    ],
)
@torch.no_grad()
def test_logits(name: str, options: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    cache, theirs = new_cache(name, **options), DynamicCache(config=model_of(name).config)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    for number, tokens in enumerate((ids(2, 60), ids(2, 5), *(ids(2, 1, seed) for seed in range(9)))):
        mask = mask if not number else torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
        ours, expected = (read(name, each, tokens, mask)[:, -1] for each in (cache, theirs))
        # Where a router chooses otherwise for the error of a codec, few logits are far off.
        off = (ours - expected).abs()
        assert (off.median() if "key_codec" in options else off.max()) <= tolerance
    cache.save(tmp_path / "cache")
    loaded, twin = PiKVCache.load(tmp_path / "cache", model_of(name)), cache.fork()
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    logits = [read(name, each, ids(2, 2), mask) for each in (cache, loaded, twin)]
    # Pages of tiers may be read in another order.
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_bytes_are_those_of_latents() -> None:
    model = model_of("deepseek_v3")
    cache, theirs = new_cache("deepseek_v3", recent_window=0, sink_tokens=0), DynamicCache(config=model.config)
    for each in (cache, theirs):
        read("deepseek_v3", each, ids(1, 400))
    config = model.config
    latents = 400 * 4 * len(theirs.layers) * (config.kv_lora_rank + config.qk_rope_head_dim)
    dynamic = sum(x.nbytes for layer in theirs.layers for x in (layer.keys, layer.values))
    if caches_latents:
        assert dynamic == latents
    report = cache.memory_report()
    assert latents <= report.keys + report.values < 1.25 * latents


@needs_latents
def test_an_adapted_projection_is_read_densely_and_right() -> None:
    model = tiny_model("deepseek_v3")
    handles = [module.kv_b_proj.register_forward_hook(lambda *_: None) for module in attention_of(model)]
    with pytest.warns(UserWarning, match="changes keys between the cache and attention"):
        cache = PiKVCache.for_model(model, **SMALL)
    theirs = DynamicCache(config=model.config)
    for tokens in (ids(2, 30), ids(2, 1), ids(2, 3)):
        with torch.no_grad():
            logits = [model(tokens, **cache_argument(each)).logits for each in (cache, theirs)]
        torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    assert set(cache.stats().dense_layers) == set(range(len(cache.layers)))
    for handle in handles:
        handle.remove()


def test_gradients_are_those_of_dynamic_cache() -> None:
    model, gradients = model_of("deepseek_v3"), []
    for cache in (new_cache("deepseek_v3"), DynamicCache(config=model.config)):
        with torch.no_grad():
            read("deepseek_v3", cache, ids(2, 30))
        embeddings = model.get_input_embeddings()(ids(2, 4, 1)).detach().requires_grad_()
        model(inputs_embeds=embeddings, **cache_argument(cache)).logits.square().mean().backward()
        gradients.append(embeddings.grad)
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=0)


@torch.no_grad()
def test_pages_are_read_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks in other threads change the numbers of pages."""
    model, owned = tiny_model("deepseek_v3", kv_lora_rank=64), []
    cache = PiKVCache.for_model(model, **SMALL)
    read_pages = expanded_history.layer_reads.dense_latents

    def note(store: Any, before: int) -> Any:
        owned.append(store.lock._is_owned())
        return read_pages(store, before)

    monkeypatch.setattr(expanded_history.layer_reads, "dense_latents", note)
    for tokens in (ids(1, 40), ids(1, 40, 1)):
        model(tokens, **cache_argument(cache))
    assert owned == [True] * len(cache.layers)


@pytest.mark.parametrize("name", sorted({"deepseek_v3", "deepseek_v32", "longcat_flash"} & set(CLASSES)))
@pytest.mark.parametrize("options", [{}, {"key_codec": "int8"}])
@torch.no_grad()
def test_many_queries_take_keys_and_values(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a product with latents costs more than to expand them, two of four heads at a time."""
    model, asked = tiny_model(name, kv_lora_rank=64), []
    monkeypatch.setattr(expanded_history, "EXPANDED_BYTES", 2 * (2 * 40 * (24 + 16) * 4))
    attend = attention_function.attend_expanded
    monkeypatch.setattr(attention_function, "attend_expanded", lambda *call: asked.append(call) or attend(*call))
    cache, theirs = PiKVCache.for_model(model, **SMALL, **options), DynamicCache(config=model.config)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    for number, tokens in enumerate((ids(2, 40), ids(2, 30, 1), ids(2, 20, 2), ids(2, 1), ids(2, 40, 3))):
        mask = mask if not number else torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
        ours, expected = (model(tokens, attention_mask=mask, **cache_argument(each)).logits for each in (cache, theirs))
        off = (ours - expected)[:, -1].abs()
        assert (off.median() if "key_codec" in options else off.max()) <= (0.05 if "key_codec" in options else 1e-3)
    # Calls 1 and 4: 21 queries cost the same either way.
    layers = sum(layer.store.heads == 1 for layer in cache.layers)
    assert [call[2].shape[2] for call in asked] == [30] * layers + [40] * layers
