"""What is left of a press when its block ends: nothing on the model, no tokens in the press."""

import gc
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES
from press_runs import PRESSES, attached, held_by, ids_of, read
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.common.foreign_attributes import ATTACHMENT_ATTRIBUTE
from pikv_hf.integration.attachment import attachment_of, detach
from pikv_hf.presses import ExpertPress, PyramidPress, QueryAwarePress

pytestmark = pytest.mark.slow

#: The attachment, which is only looked up again, what kvpress's wrapper of attention functions sets in any forward
#: pass, and the output projections' Gram matrices that `PiKVPress` computes once per model.
STAY = {ATTACHMENT_ATTRIBUTE, "masked_key_indices"}


def state(model: Any) -> dict[str, Any]:
    modules = dict(model.named_modules())
    return {
        "attention": model.config._attn_implementation,
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "attributes": {name: set(vars(module)) - STAY for name, module in modules.items()},
        "parameters": [name for name, _ in model.named_parameters()],
    }


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("kept_attached", [False, True])
def test_the_model_is_as_before(name: str, kept_attached: bool) -> None:
    model = FAMILIES["qwen3_moe"].build()
    if kept_attached:
        attached(model)
    before = state(model)
    for _ in range(2):
        read(model, DynamicCache(), ids_of(80), PRESSES[name](compression_ratio=0.5))
        assert state(model) == before
    with pytest.raises(RuntimeError, match="on purpose"):
        fail_within(PRESSES[name](compression_ratio=0.5), model)
    assert state(model) == before


def fail_within(press: Any, model: Any) -> None:
    with press(model):
        read(model, DynamicCache(), ids_of(80))
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("name", PRESSES)
def test_blocks_within_blocks_end_one_by_one(name: str) -> None:
    model = FAMILIES["qwen3_moe"].build()
    before = state(model)
    with ExpertPress(0.0)(model):
        inside = state(model)
        with PRESSES[name](compression_ratio=0.5)(model):
            pass
        assert state(model) == inside
    assert state(model) == before


def test_a_call_that_fails_midway_leaves_no_tokens_behind() -> None:
    model = FAMILIES["qwen3_moe"].build()
    press = PyramidPress(0.5)
    cache = attached(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        read(model, cache, ids_of(80), press)
    handle.remove()
    tokens = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert tokens() is None
    again = read(model, attached(model), ids_of(80), press)
    fresh = read(model, attached(model), ids_of(80), PyramidPress(0.5))
    for mine, theirs in zip(held_by(again), held_by(fresh), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("kind", ["pikv", "dynamic"])
def test_a_press_keeps_no_tokens_alive(name: str, kind: str) -> None:
    model = FAMILIES["qwen3_moe"].build()
    press = PRESSES[name](compression_ratio=0.5)
    kept: list[weakref.ref[Any]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        kept.append(weakref.ref(kwargs["hidden_states"]))
        kept.extend(weakref.ref(part) for part in kwargs["position_embeddings"])

    handles = [
        layer.self_attn.register_forward_hook(note, with_kwargs=True, prepend=True) for layer in model.model.layers
    ]
    cache = attached(model) if kind == "pikv" else DynamicCache()
    read(model, cache, ids_of(90), press)
    layers = [weakref.ref(layer) for layer in cache.layers]
    for handle in handles:
        handle.remove()
    del cache
    gc.collect()
    assert kept
    assert not any(reference() is not None for reference in [*kept, *layers])
    held = [value for value in vars(press).values() if isinstance(value, torch.Tensor)]
    assert not held


@pytest.mark.parametrize("name", PRESSES)
def test_one_press_serves_many_prompts_and_models(name: str) -> None:
    press = PRESSES[name](compression_ratio=0.5)
    models = [FAMILIES["qwen3_moe"].build(seed=seed) for seed in (0, 1)] + [FAMILIES["mixtral"].build()]
    for model in (models[0], models[1], models[2], models[0]):
        for tokens in (90, 60):
            mine = read(model, attached(model), ids_of(tokens), press)
            fresh = read(model, attached(model), ids_of(tokens), PRESSES[name](compression_ratio=0.5))
            # The last layer packs its tokens when the cache is looked at.
            assert mine.nbytes == fresh.nbytes
            for layer, other in zip(mine.layers, fresh.layers, strict=True):
                torch.testing.assert_close(layer.keys, other.keys)
                assert torch.equal(layer.stored_mask(), other.stored_mask())


def test_a_cache_that_is_made_within_the_block_can_be_read_within() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with QueryAwarePress(0.5)(model), torch.no_grad():
        cache = PiKVCache.for_model(model, placement="hash", page_size=8, recent_window=16)
        model.model(ids_of(80), past_key_values=cache)
        assert {int(count) for held in held_by(cache) for count in held.sum(dim=-1).flatten()} == {40}
        assert model(ids_of(3), past_key_values=cache).logits.isfinite().all()


def test_a_cache_that_is_made_within_the_block_can_be_read_after_it() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with QueryAwarePress(0.5)(model), torch.no_grad():
        cache = PiKVCache.for_model(model, placement="hash", page_size=8, recent_window=16)
        model.model(ids_of(80), past_key_values=cache)
    with torch.no_grad():
        assert model(ids_of(3), past_key_values=cache).logits.isfinite().all()


def test_a_model_that_was_attached_stays_so_and_one_that_was_not_does_not() -> None:
    model = FAMILIES["qwen3_moe"].build()
    with QueryAwarePress(0.5)(model):
        assert attachment_of(model).active
    assert not attachment_of(model).active
    attached(model)
    with QueryAwarePress(0.5)(model):
        pass
    assert attachment_of(model).active
    detach(model)
    assert model.config._attn_implementation == "sdpa"
