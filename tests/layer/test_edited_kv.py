"""Keys and values that are edited from outside count as they do in DynamicCache, or are refused by all layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.common.transformers_release import cache_argument

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 8, "sink_tokens": 2, "num_shards": 3}
MORE = prompts(2, 3, seed=3)["input_ids"].clamp_min(2)


def keys_alone(layer: Any) -> None:
    layer.keys = layer.keys * 1.5


def keys_multiplied(layer: Any) -> None:
    layer.keys *= 1.5


def values_alone(layer: Any) -> None:
    layer.values = layer.values * 1.5


def both(layer: Any) -> None:
    layer.keys, layer.values = layer.keys * 1.5, layer.values + 1


def through_data(layer: Any) -> None:
    keys, values = layer.keys, layer.values
    keys.data.mul_(2)
    values.data[:, :, 2] = 0
    layer.keys, layer.values = keys, values


def through_numpy(layer: Any) -> None:
    keys = layer.keys
    keys.numpy()[:, :, 2] = 0
    layer.keys = keys
    layer.values = layer.values


def through_numpy_keys_alone(layer: Any) -> None:
    keys = layer.keys
    keys.numpy()[:, :, 2] = 0
    layer.keys = keys


EDITS = [keys_alone, keys_multiplied, values_alone, both, through_data, through_numpy, through_numpy_keys_alone]


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama"])
@torch.no_grad()
def test_edits_count(family: str, edit: Callable[[Any], None], attached: bool) -> None:
    model = FAMILIES[family].build()
    config = PiKVConfig(**SMALL, placement="hash")
    logits = []
    for make in (
        lambda: DynamicCache(config=model.config),
        lambda: PiKVCache.for_model(model, config) if attached else PiKVCache(model.config, config),
    ):
        cache = make()
        model(prompts(2, 20)["input_ids"], **cache_argument(cache))
        for layer in cache.layers:
            edit(layer)
        logits.append([model(MORE, **cache_argument(cache)).logits for _ in range(2)])
        assert cache.get_seq_length() == 26
    for ours, theirs in zip(*logits, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama"])
@torch.no_grad()
def test_keys_that_do_not_fit_the_values_are_refused_by_all_layers_every_time(family: str) -> None:
    model = FAMILIES[family].build()
    cache = PiKVCache.for_model(model, **SMALL, placement="hash")
    model(prompts(2, 20)["input_ids"], **cache_argument(cache))
    layer = next(layer for layer in reversed(cache.layers) if hasattr(layer, "keep"))
    keys, values = layer.keys, layer.values
    layer.keys = keys[:, :, :7]
    for _ in range(4):
        with pytest.raises(
            RuntimeError, match=r"keys \(2, \d, 7, 16\) were assigned without values.*\(2, \d, 20, 16\)"
        ):
            model(MORE, **cache_argument(cache))
        assert [each.get_seq_length() for each in cache.layers] == [20] * len(cache.layers)
    layer.keys, layer.values = keys, values
    logits = model(MORE, **cache_argument(cache)).logits
    reference = DynamicCache(config=model.config)
    model(prompts(2, 20)["input_ids"], **cache_argument(reference))
    assert (logits - model(MORE, **cache_argument(reference)).logits).abs().max() <= 1e-4
