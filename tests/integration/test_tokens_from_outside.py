"""Tokens that no forward of the model brings: other caches converted or copied layer by layer, prefixes, iteration."""

from typing import Any

import pytest
import torch
from exact_runs import assert_same
from families import FAMILIES, prompts
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft_versions import needs_peft
from transformers import DynamicCache, QuantizedCache, StaticCache

from pikv_hf import PiKVCache, detach

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
PROMPT = prompts(2, 50)
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
}


def turn() -> dict[str, torch.Tensor]:
    """Return the prompt and some tokens more; the mask goes on to hide its padding."""
    more = prompts(2, 5, seed=3)["input_ids"].clamp_min(2)
    mask = torch.nn.functional.pad(PROMPT["attention_mask"], (0, 5), value=1)
    return {"input_ids": torch.cat([PROMPT["input_ids"], more], dim=1), "attention_mask": mask}


def filled(model: Any, cache: Any) -> Any:
    with torch.no_grad():
        model(**PROMPT, past_key_values=cache)
    return cache


def continued(model: Any, cache: Any) -> Any:
    return model.generate(**turn(), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("knows_config", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"placement": "balanced"}),
        ("llama", {"placement": "hash", "key_codec": "none"}),
        ("gpt_oss", {}),
        ("gpt_oss", {"sliding_layers": "paged"}),
    ],
)
def test_a_dynamic_cache_converted(family: str, options: dict[str, Any], knows_config: bool) -> None:
    """Padding is stored with all the rest: the mask goes on to hide it."""
    model = FAMILIES[family].build()
    reference = filled(model, DynamicCache(config=model.config) if knows_config else DynamicCache())
    if knows_config and options.get("sliding_layers") == "paged":
        with pytest.raises(ValueError, match=r"layer 0 has kept 23 of 50 tokens.*sliding_layers=\"paged\""):
            PiKVCache.from_cache(model, reference, **SMALL, **options)
        return
    cache = PiKVCache.from_cache(model, reference, **SMALL, **options)
    assert cache.get_seq_length() == reference.get_seq_length() == 50
    ours = continued(model, cache)
    detach(model)
    assert_same(ours, continued(model, reference))


def test_a_converted_cache_leaves_the_other_as_it_was() -> None:
    model = FAMILIES["mixtral_sliding"].build()
    reference = filled(model, DynamicCache(config=model.config))
    before = [(layer.keys.clone(), layer.get_seq_length()) for layer in reference.layers]
    continued(model, PiKVCache.from_cache(model, reference, **SMALL))
    for (keys, length), layer in zip(before, reference.layers, strict=True):
        assert torch.equal(layer.keys, keys)
        assert layer.get_seq_length() == length


def test_a_cache_of_its_own_converted() -> None:
    """Stored otherwise, and for a model that is attached now."""
    model = FAMILIES["qwen3_moe"].build()
    paged, reference = (filled(model, each) for each in (PiKVCache(model.config), DynamicCache(config=model.config)))
    ours = continued(model, PiKVCache.from_cache(model, paged, **SMALL))
    assert not PiKVCache.from_cache(model, DynamicCache()).get_seq_length()
    detach(model)
    assert_same(ours, continued(model, reference))


def test_what_cannot_be_converted() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with pytest.raises(TypeError, match="got tuple"):
        PiKVCache.from_cache(model, ())
    # Its length leaves out columns of zeros, as those of padding are.
    with pytest.raises(TypeError, match="layer 0 is of type StaticLayer"):
        PiKVCache.from_cache(model, filled(model, StaticCache(config=model.config, max_cache_len=80)))
    fewer = DynamicCache([(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16))] * 2)
    with pytest.raises(ValueError, match="has 2 layers, 2 of them with tokens, but the model's cache has 3"):
        PiKVCache.from_cache(model, fewer)
    uneven = DynamicCache([(torch.zeros(1, 2, 4 + extra, 16),) * 2 for extra in range(3)])
    with pytest.raises(ValueError, match=r"different lengths: \[4, 5, 6\]"):
        PiKVCache.from_cache(model, uneven)
    evicted = filled(model, PiKVCache.for_model(model, **SMALL))
    kept = torch.ones(2, 2, 50, dtype=torch.bool)
    kept[:, :, 30] = False
    for layer in evicted.layers:
        layer.keep(kept)
    with pytest.raises(ValueError, match="layer 0: tokens were evicted"):
        PiKVCache.from_cache(model, evicted)
    with pytest.raises(ValueError, match="layer 0: tokens were evicted"):
        list(evicted)


def test_quantised_layers_cannot_be_converted() -> None:
    pytest.importorskip("optimum.quanto", reason="transformers' quantised layers need optimum-quanto")
    model = FAMILIES["qwen3_moe"].build()
    with pytest.raises(TypeError, match="layer 0 is of type QuantoQuantizedLayer"):
        PiKVCache.from_cache(model, filled(model, QuantizedCache("quanto", model.config)))


@pytest.mark.parametrize("placement", ["expert", "balanced", "hash"])
def test_layer_by_layer_into_an_attached_cache(placement: str) -> None:
    """In several pieces, token by token too: `update` returns all K/V, as DynamicCache's does, and nothing waits."""
    model = FAMILIES["qwen3_moe"].build()
    reference = filled(model, DynamicCache(config=model.config))
    cache = PiKVCache.for_model(model, placement=placement, **SMALL)
    for index, layer in enumerate(reference.layers):
        for start, stop in ((0, 20), (20, 21), (21, 50)):
            keys, values = cache.update(layer.keys[:, :, start:stop], layer.values[:, :, start:stop], index)
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
        assert cache.layers[index].pending is None
    ours = continued(model, cache)
    detach(model)
    assert_same(ours, continued(model, reference))


def test_a_detached_model_goes_on_with_a_cache_placed_by_experts() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    detach(model)
    reference = DynamicCache(config=model.config)
    for each in (cache, reference):
        filled(model, each)
    assert_same(continued(model, cache), continued(model, reference))


def test_iterating_as_dynamic_cache_does() -> None:
    model = FAMILIES["gpt_oss"].build()
    cache, reference = (filled(model, each) for each in (PiKVCache(model.config), DynamicCache(config=model.config)))
    for ours, theirs in zip(cache, reference, strict=True):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
    assert list(PiKVCache(model.config))[1] == (None, None, None)


@needs_peft
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_peft_prompts(kind: type) -> None:
    """PEFT gives the model a DynamicCache with its prefix, in place of any other; prompts as embeddings are paged."""
    model = FAMILIES["qwen3_moe"].build()
    tuned = get_peft_model(model, kind(num_virtual_tokens=7, task_type="CAUSAL_LM")).eval()
    options = {"max_new_tokens": 8, "do_sample": False, **PROMPT}
    expected = tuned.generate(**options, past_key_values=DynamicCache(config=model.config))
    cache = PiKVCache.for_model(tuned, **SMALL)
    assert torch.equal(tuned.generate(**options, past_key_values=cache), expected)
    assert bool(cache.get_seq_length()) == (kind is not PrefixTuningConfig)
    with torch.no_grad():
        assert tuned(**PROMPT, past_key_values=PiKVCache.for_model(tuned)).logits.isfinite().all()


@needs_peft
def test_a_prefix_of_peft_converted() -> None:
    """With it in a cache, the base model goes on as PEFT would have it: its tokens have positions, but no ids."""
    model = FAMILIES["qwen3_moe"].build()
    tuned = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM")).eval()
    expected = tuned.generate(**PROMPT, max_new_tokens=8, do_sample=False)
    cache = PiKVCache.from_cache(tuned, tuned.get_prompt(2), **SMALL)
    ids, mask = (
        torch.nn.functional.pad(PROMPT[name], (7, 0), value=value)
        for name, value in (("input_ids", 0), ("attention_mask", 1))
    )
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[:, 7:], expected)
    assert cache.get_seq_length() == 7 + 50 + 7
