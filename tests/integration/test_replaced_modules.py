"""Modules replaced after attaching, as quantizers, pruning and patches do: attaching again hooks the new ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from placed_hooks import hooks_of
from torch import nn

from pikv_hf import PiKVCache, attach, detach

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
INPUTS = {name: given[-2:] for name, given in prompts(batch=4, length=20).items()}
INPUTS["attention_mask"][:] = 1


def renewed(module: nn.Module, config: Any) -> nn.Module:
    """Return another module with the same weights, which reads the model's config as the first did."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if hasattr(part, "config"):
            part.config = config
    return twin


def replace_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn = renewed(layer.self_attn, model.config)


def replace_experts(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts = renewed(layer.mlp.experts, model.config)


def replace_feed_forward(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = renewed(layer.mlp, model.config)


def replace_one_layer(model: Any) -> None:
    model.model.layers[1] = renewed(model.model.layers[1], model.config)


def replace_all_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList(renewed(layer, model.config) for layer in model.model.layers)


def replace_projections(model: Any) -> None:
    """What quantizers and PEFT do: nothing that is hooked."""
    for layer in model.model.layers:
        layer.self_attn.q_proj = renewed(layer.self_attn.q_proj, model.config)


REPLACE: list[Callable[[Any], None]] = [
    replace_attention,
    replace_experts,
    replace_feed_forward,
    replace_one_layer,
    replace_all_layers,
    replace_projections,
]


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("detached", [True, False])
def test_new_modules_are_hooked(replace: Callable[[Any], None], detached: bool) -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    PiKVCache.for_model(model)
    replace(model)
    if detached:
        detach(model)
    cache = PiKVCache.for_model(model, **SMALL)
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)
    model(**INPUTS)  # What copied modules brought with them goes with their first call.
    assert hooks_of(model) == 3 * 5 + 2
    detach(model)
    assert hooks_of(model) == 0
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("replace", REPLACE)
def test_caches_go_on_with_a_model_that_is_attached_again(replace: Callable[[Any], None]) -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(**{name: given[:, :12] for name, given in INPUTS.items()}, past_key_values=cache)
    replace(model)
    attach(model)
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)


@pytest.mark.parametrize("replace", REPLACE)
def test_caches_go_on_or_are_refused_where_nobody_attached_again(replace: Callable[[Any], None]) -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    cache = PiKVCache.for_model(model, **SMALL)
    replace(model)
    refused: ValueError | None = None
    try:
        said = model.generate(**INPUTS, past_key_values=cache, **OPTIONS)
    except ValueError as error:
        refused = error
    if refused is None:
        assert torch.equal(said, expected)
    else:
        assert "attach(model)" in str(refused)
        assert cache.get_seq_length() == 0


def test_more_experts_than_a_cache_was_made_for_are_refused() -> None:
    model, larger = FAMILIES["qwen3_moe"].build(), FAMILIES["qwen3_moe"].build(num_experts=64)
    cache = PiKVCache.for_model(model, **SMALL)
    for layer, other in zip(model.model.layers, larger.model.layers, strict=True):
        layer.mlp = other.mlp
    attach(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"expert \d+ of a layer .* 8"):
        model(**INPUTS, past_key_values=cache)
    fresh = PiKVCache.for_model(model, **SMALL)
    assert torch.equal(model.generate(**INPUTS, past_key_values=fresh, **OPTIONS), model.generate(**INPUTS, **OPTIONS))


def test_fewer_layers_and_fewer_experts() -> None:
    model, smaller = FAMILIES["qwen3_moe"].build(), FAMILIES["qwen3_moe"].build(num_experts=4)
    PiKVCache.for_model(model)
    for layer, other in zip(model.model.layers, smaller.model.layers, strict=True):
        layer.mlp = other.mlp
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.num_experts = 2, 4
    expected = model.generate(**INPUTS, **OPTIONS)
    cache = PiKVCache.for_model(model, **SMALL)
    assert sorted(cache.attachment.expert_routers) == [0, 1]
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)
