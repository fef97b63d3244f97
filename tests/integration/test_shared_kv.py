"""Layers that attend over the K/V of an earlier one (Gemma 3n, Gemma 4): over its pages, in place."""

import functools
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model

#: By model type, options for layers that share.
SHARING: dict[str, dict[str, Any]] = {
    "gemma3n_text": {},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
KNOWN = sorted(SHARING.keys() & CLASSES.keys())


@functools.cache
def model_of(name: str) -> Any:
    model = tiny_model(name, **SHARING[name])
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("sliding_layers", ["bounded", "paged"])
@pytest.mark.parametrize("options", [{}, {"recent_window": 0, "sink_tokens": 0}, {"tiers": {"cpu": "1 MiB"}}])
@torch.no_grad()
def test_logits(name: str, padding: int, sliding_layers: Any, options: dict[str, Any]) -> None:
    model = model_of(name)
    ids = torch.randint(3, VOCAB, (3, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    seen: list[list[torch.Tensor]] = []
    for pikv in (False, True):
        detach(model)
        cache: Any = DynamicCache(config=model.config)
        if pikv:
            cache = PiKVCache.for_model(model, placement="hash", page_size=8, sliding_layers=sliding_layers, **options)
        logits, given = [], None
        for start, stop in ((0, 45), (45, 50), (50, 51), (51, 52)):
            given = mask[:, :stop] if padding else None
            logits.append(model(ids[:, start:stop], attention_mask=given, **cache_argument(cache)).logits[:, -1])
        seen.append(logits)
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", KNOWN)
def test_generates_as_with_dynamic_cache(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 13}):
        given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        detach(model)
        expected = model.generate(ids, **given, **cache_argument(DynamicCache(config=model.config)))
        cache = PiKVCache.for_model(model, placement="hash", page_size=8)
        assert torch.equal(model.generate(ids, **given, **cache_argument(cache)), expected)


@pytest.mark.skipif("qwen3_omni_moe_thinker" not in CONFIGS, reason="this transformers has no such model type")
def test_windows_of_the_cache_alone_are_not_paged() -> None:
    model = tiny_model("qwen3_omni_moe_thinker")
    with pytest.raises(ValueError, match="a window of 24 tokens in the cache alone"):
        PiKVCache.for_model(model, sliding_layers="paged")
    assert PiKVCache.for_model(model).get_seq_length() == 0


@pytest.mark.skipif("moshi" not in CONFIGS, reason="this transformers has no such model type")
def test_windows_that_no_mask_shows_are_not_paged() -> None:
    """The cache of a config alone leaves masks to the model, which may make none of windows."""
    model = tiny_model("moshi")
    slides = any("sliding" in name for name in vars(sys.modules[type(model).__module__]))
    options = PiKVConfig(sliding_layers="paged")
    if slides:
        assert PiKVCache(model.config, options).get_seq_length() == 0
        return
    with pytest.raises(ValueError, match="a window of 24 tokens in the cache alone"):
        PiKVCache(model.config, options)
