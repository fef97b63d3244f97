"""Keys and values that are edited from outside count as they do in DynamicCache, or are refused by all layers."""

import copy
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
    """Logits after an edit are as near to those of float64 as DynamicCache's are, not near to its rounding."""
    model = FAMILIES[family].build()
    config = PiKVConfig(**SMALL, placement="hash")
    precise = copy.deepcopy(model).double()
    # The others compute in float32 whatever they are given.
    precise.config._experts_implementation = "eager"
    exact = _after_edit(precise, DynamicCache(config=model.config), edit)
    theirs = _after_edit(model, DynamicCache(config=model.config), edit)
    made = PiKVCache.for_model(model, config) if attached else PiKVCache(model.config, config)
    ours = _after_edit(model, made, edit)
    for call in range(2):
        rounded = _distance(theirs[call], exact[call])
        assert rounded <= 1e-4
        assert _distance(ours[call], exact[call]) <= 2 * rounded


def _after_edit(model: Any, cache: Any, edit: Callable[[Any], None]) -> list[torch.Tensor]:
    """Return the logits of two calls, `(16, 3, V)` float64, after a prompt whose K/V are edited."""
    model(prompts(16, 20)["input_ids"], **cache_argument(cache))
    for layer in cache.layers:
        edit(layer)
    more = prompts(16, 3, seed=3)["input_ids"].clamp_min(2)
    logits = [model(more, **cache_argument(cache)).logits.double() for _ in range(2)]
    assert cache.get_seq_length() == 26
    return logits


def _distance(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).square().mean().sqrt())


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
