"""Hooks that run the model within one of its own forwards: what a router says there is none of the outer call's."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from torch import nn
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.integration.attachment import attachment_of

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8, "sink_tokens": 2}
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
#: Other tokens than the outer call's, and another number of them.
OTHER = {"input_ids": torch.arange(2, 15).view(1, -1)}
ONE = {"input_ids": torch.arange(2, 4).view(2, 1)}


def plain(model: Any) -> None:
    model(**OTHER, use_cache=False)
    # As many tokens as the outer call has in a decoding step.
    model(**ONE, use_cache=False)


def dynamic(model: Any) -> None:
    model(**OTHER, past_key_values=DynamicCache(config=model.config))


def paged(model: Any) -> None:
    routed = bool(attachment_of(model).expert_routers)
    cache = PiKVCache.for_model(model, placement="expert" if routed else "hash", **SMALL)
    for _ in range(2):
        model(**OTHER, past_key_values=cache)


def generate(model: Any) -> None:
    model.generate(**OTHER, past_key_values=PiKVCache.for_model(model, **SMALL), max_new_tokens=3, do_sample=False)


def failing(model: Any) -> None:
    """A nested call that fails between attention and router of a layer."""
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(_fail)
    with contextlib.suppress(ZeroDivisionError):
        model(**OTHER, past_key_values=PiKVCache.for_model(model, **SMALL))
    model.model.layers[1].post_attention_layernorm._forward_pre_hooks.popitem()


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


NESTED: list[Callable[[Any], None]] = [plain, dynamic, paged, generate, failing]


def run_nested(model: Any, module: nn.Module, nested: Callable[[Any], None], before: bool) -> Any:
    """Run the model once within each forward of one of its modules, before or after what the module does."""
    inside = False

    def hook(*_: Any) -> None:
        nonlocal inside
        if not inside:
            inside = True
            nested(model)
            inside = False

    return module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)


def experts_by_position(cache: PiKVCache) -> list[dict[tuple[int, int], int]]:
    """Return the expert that is noted for each token, by row and position, of every layer."""
    cache.memory_report()
    found = []
    for layer in cache.layers:
        pool = layer.table.plain
        found.append(
            {
                (row, int(pool.positions[page, slot])): int(pool.experts[page, slot])
                for row, sequence in enumerate(layer.table.rows)
                for page in sequence.pages()
                for slot in range(pool.count[page])
            }
        )
    return found


def module_at(model: Any, place: str) -> nn.Module:
    layer = model.model.layers[1]
    return layer if place == "layer" else getattr(layer, place)


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize(
    ("place", "before"), [("self_attn", True), ("self_attn", False), ("mlp", True), ("mlp", False), ("layer", True)]
)
def test_nested_calls_do_not_mix(nested: Callable[[Any], None], place: str, before: bool) -> None:
    model, inputs = FAMILIES["qwen3_moe"].build(), prompts(batch=2, length=20)
    expected = model.generate(**inputs, **OPTIONS)
    undisturbed = PiKVCache.for_model(model, **SMALL)
    model.generate(**inputs, past_key_values=undisturbed, **OPTIONS)

    cache = PiKVCache.for_model(model, **SMALL)
    handle = run_nested(model, module_at(model, place), nested, before)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **OPTIONS), expected)
    handle.remove()
    experts = experts_by_position(cache)
    assert experts == experts_by_position(undisturbed)
    assert min(min(layer.values()) for layer in experts) >= 0, "the experts of some tokens are not known"


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama"])
@pytest.mark.parametrize("nested", [plain, paged])
def test_nested_calls_of_other_families(name: str, nested: Callable[[Any], None]) -> None:
    model, inputs = FAMILIES[name].build(), prompts(batch=2, length=20)
    expected = model.generate(**inputs, **OPTIONS)
    placement = "expert" if FAMILIES[name].routed else "hash"
    cache = PiKVCache.for_model(model, placement=placement, sliding_layers="paged", **SMALL)
    run_nested(model, model.model.layers[1].self_attn, nested, before=False)
    run_nested(model, model.model.layers[0].self_attn, nested, before=True)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **OPTIONS), expected)


def test_nested_call_of_one_layer() -> None:
    """A hook may run a decoder layer alone."""
    model, inputs = FAMILIES["qwen3_moe"].build(), prompts(batch=2, length=20)
    expected = model.generate(**inputs, **OPTIONS)

    def nested(model: Any) -> None:
        hidden = torch.randn(1, 5, 64)
        rotation = model.model.rotary_emb(hidden, torch.arange(5)[None])
        model.model.layers[1](hidden, position_embeddings=rotation)

    cache = PiKVCache.for_model(model, **SMALL)
    run_nested(model, model.model.layers[1].self_attn, nested, before=False)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **OPTIONS), expected)


def test_interrupted_calls_leave_nothing_behind() -> None:
    """Also Ctrl-C, of which torch tells no hook."""
    model, inputs = FAMILIES["qwen3_moe"].build(), prompts(batch=2, length=20)
    expected = model.generate(**inputs, **OPTIONS)
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        handle = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model.generate(**inputs, past_key_values=PiKVCache.for_model(model, **SMALL), **OPTIONS)
        handle.remove()
        cache = PiKVCache.for_model(model, **SMALL)
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **OPTIONS), expected)
        assert min(min(layer.values()) for layer in experts_by_position(cache)) >= 0
