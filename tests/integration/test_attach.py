"""Attaching and detaching, and what an attached model does with other caches."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from placed_hooks import hooks_of
from transformers import DynamicCache, StaticCache

from pikv_hf import PiKVCache, PiKVConfig, attach, detach
from pikv_hf.integration.attachment import attachment_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "jetmoe", "mixtral_sliding"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "config", "none", "chunks"])
def test_other_caches_behave_as_with_sdpa(name: str, kind: str) -> None:
    model = FAMILIES[name].build()
    # gpt-oss has no sdpa implementation; eager is what it runs otherwise.
    model.set_attn_implementation("eager" if name == "gpt_oss" else "sdpa")

    def run() -> torch.Tensor:
        options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "disable_compile": True}
        if kind == "static":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=120)
        elif kind == "none":
            options["use_cache"] = False
        elif kind == "config":
            options["past_key_values"] = PiKVCache(model.config)
        else:
            options["past_key_values"] = DynamicCache(config=model.config)
        if kind == "chunks":
            options["prefill_chunk_size"] = 20
        return model.generate(**prompts(), **options)

    expected = run()
    with attach(model):
        assert model.config._attn_implementation == "pikv"
        assert torch.equal(run(), expected)
    assert model.config._attn_implementation == ("eager" if name == "gpt_oss" else "sdpa")


def test_attaching_twice_and_detaching() -> None:
    model = FAMILIES["qwen3_moe"].build()
    assert attach(model) is attach(model)
    # Per layer one of the layer, one of its router, one of its attention, one after the layer and two after its
    # attention; two of the models around them.
    assert hooks_of(model) == 3 * 5 + 2
    detach(model)
    detach(model)
    assert hooks_of(model) == 0
    assert model.config._attn_implementation == "sdpa"


def test_with_block_leaves_an_earlier_attachment() -> None:
    model = FAMILIES["qwen3_moe"].build()
    PiKVCache.for_model(model)
    with attach(model), attach(model):
        pass
    assert model.config._attn_implementation == "pikv"
    detach(model)
    with attach(model):
        PiKVCache.for_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_cache_goes_on_after_attaching_again() -> None:
    model = FAMILIES["qwen3_moe"].build()
    inputs, options = prompts(), {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    cache = PiKVCache.for_model(model, page_size=8, recent_window=8)
    with torch.no_grad():
        model(**{k: v[:, :-10] for k, v in inputs.items()}, past_key_values=cache, position_ids=positions(inputs))
    detach(model)
    attach(model)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


def positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)[:, :-10]


def test_switching_the_implementation_between_calls() -> None:
    """A hash-placed cache may be read in place at one step and densely at the next."""
    model = FAMILIES["qwen3_moe"].build()
    logits = []
    for make in (lambda: DynamicCache(config=model.config), lambda: PiKVCache.for_model(model, placement="hash")):
        cache, steps = make(), []
        with torch.no_grad():
            model(**prompts(), past_key_values=cache)
            mask = prompts()["attention_mask"]
            for step, implementation in enumerate(["pikv", "sdpa", "pikv", "eager", "pikv"]):
                mask = torch.nn.functional.pad(mask, (0, 2), value=1)
                if isinstance(cache, PiKVCache):
                    model.set_attn_implementation(implementation)
                ids = torch.full((3, 2), 5 + step)
                steps.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        logits.append(torch.cat(steps, dim=1))
        detach(model)
    assert not any(layer.state.reference_lost for layer in cache.layers), "reading in place has not resumed"
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_copied_model_is_not_attached() -> None:
    model = FAMILIES["qwen3_moe"].build()
    PiKVCache.for_model(model)
    twin = copy.deepcopy(model)
    assert attachment_of(twin) is None
    assert PiKVCache.for_model(twin).attachment is not attachment_of(model)
    detach(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_attachment_does_not_keep_the_model_alive() -> None:
    model = FAMILIES["llama"].build()
    cache = PiKVCache.for_model(model, placement="hash")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert cache.attachment.model is None


def test_two_caches_in_turn() -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**prompts(), max_new_tokens=12, do_sample=False)
    caches = [PiKVCache.for_model(model, page_size=8, recent_window=8) for _ in range(2)]
    sequences = [prompts()["input_ids"]] * 2
    for _ in range(12):
        for index, cache in enumerate(caches):
            mask = torch.cat([prompts()["attention_mask"], torch.ones_like(sequences[index][:, 75:])], dim=1)
            inputs = {"input_ids": sequences[index], "attention_mask": mask}
            sequences[index] = model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert torch.equal(sequences[0], expected)
    assert torch.equal(sequences[1], expected)


def test_config_alone_needs_hash_placement() -> None:
    config = FAMILIES["qwen3_moe"].build().config
    with pytest.raises(ValueError, match="for_model"):
        PiKVCache(config, PiKVConfig(placement="expert"))
    assert "paged" in repr(PiKVCache(config))
