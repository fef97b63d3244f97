"""Models with layers that were copied: attached if each has its place in the cache, else refused for what is wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES

from pikv_hf import PiKVCache, detach

IDS = torch.randint(2, 198, (2, 30), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def appended(model: Any, layer_idx: int | None = None) -> None:
    """Repeat the first layer at the end, as merges of a model with itself do."""
    twin = copy.deepcopy(model.model.layers[0])
    twin.self_attn.layer_idx = len(model.model.layers) if layer_idx is None else layer_idx
    model.model.layers.append(twin)


def repeated(model: Any) -> None:
    appended(model)
    model.config.num_hidden_layers = len(model.model.layers)


def copied(model: Any) -> None:
    """Give every layer a config of its own."""
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers)


def copied_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn = copy.deepcopy(layer.self_attn)


def separate_config(model: Any) -> None:
    model.config = copy.deepcopy(model.config)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("change", [repeated, copied, copied_attention, separate_config])
def test_copies_are_attached(change: Callable[[Any], None], implementation: str) -> None:
    model = FAMILIES["mixtral"].build()
    change(model)
    model.set_attn_implementation(implementation)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    expected = model.generate(IDS, attention_mask=mask, **OPTIONS)
    cache = PiKVCache.for_model(model, page_size=4, recent_window=8)
    assert len(cache.attachment.expert_routers) == len(model.model.layers)
    assert torch.equal(model.generate(IDS, attention_mask=mask, past_key_values=cache, **OPTIONS), expected)
    assert [layer.store.padding()[0] for layer in cache.layers] == [7] * len(cache.layers)
    assert not cache.stats().dense_layers
    detach(model)
    assert {key: config._attn_implementation for key, config in configs.items()} == before


def same_index(model: Any) -> None:
    appended(model, layer_idx=0)
    model.config.num_hidden_layers = 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (same_index, r"2 attention modules with layer_idx=0: model.layers.0.self_attn, model.layers.3.self_attn"),
        (appended, r"layer_idx=3, model.layers.3.self_attn, and its config counts 3 layers; set num_hidden_layers"),
    ],
)
def test_copies_without_a_place_are_refused(change: Callable[[Any], None], reason: str) -> None:
    model = FAMILIES["mixtral"].build()
    change(model)
    with pytest.raises(ValueError, match=reason):
        PiKVCache.for_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_copies_that_come_after_attaching_are_found_by_attaching_again() -> None:
    model = FAMILIES["mixtral"].build()
    PiKVCache.for_model(model)
    repeated(model)
    expected = model.generate(IDS, **OPTIONS)
    assert torch.equal(model.generate(IDS, past_key_values=PiKVCache.for_model(model), **OPTIONS), expected)
    same_index(model)
    with pytest.raises(ValueError, match="layer_idx=0"):
        PiKVCache.for_model(model)
