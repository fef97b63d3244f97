"""A cache goes on in another of torch's modes than it was filled in: what it stores are ordinary tensors."""

import copy
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_operation import layer_operation
from pikv_hf.layer.layer_reads import storages

SMALL = {"page_size": 8, "recent_window": 16, "num_shards": 3}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
# Each ordered pair of modes comes at some place, and the first and the last call are in every mode.
ORDERS = ["inference no_grad grad", "no_grad inference inference", "grad inference grad", "grad no_grad inference"]
LOSSLESS: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced": {"placement": "balanced"},
    "tiers": {"tiers": {"cpu": 16384, "disk": None}},
    "tracked": {"budget": 1 << 20, "scheduler": "pikv"},
    "all pages routed": {"routing": "page_bound", "max_pages": 1000},
}
LOSSY: dict[str, dict[str, Any]] = {
    "int8": {"key_codec": "int8", "value_codec": "int8"},
    "lowrank": {"key_codec": "lowrank", "value_codec": "lowrank", "rank": 4},
    "evicting": {"budget": 48, "scheduler": "h2o"},
    "routed": {"routing": "page_bound", "max_pages": 2},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build().requires_grad_(False)


def steps(model: Any, cache: Any, modes: list[str]) -> list[torch.Tensor]:
    """Run a program of public calls, one mode after the other, and return the logits of each call."""
    given = prompts(2, 60, seed=3)
    ids, mask = given["input_ids"], given["attention_mask"]
    cycle, logits = itertools.cycle(modes), []

    def call(start: int, end: int) -> None:
        with MODES[next(cycle)]():
            output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(output.logits.clone())

    call(0, 40)
    call(40, 41)
    call(41, 47)
    with MODES[next(cycle)]():
        cache.crop(-4)
    call(43, 44)
    with MODES[next(cycle)]():
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
    call(44, 52)
    with MODES[next(cycle)]():
        cache = copy.deepcopy(cache)
    for start in range(52, 60):
        call(start, start + 1)
    return logits


def assert_ordinary(cache: PiKVCache) -> None:
    for layer in cache.layers:
        assert isinstance(layer, PiKVLayer)
        for tensor in storages(layer.store):
            assert not tensor.is_inference()
            assert not tensor.requires_grad


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_modes_change_nothing(model: Any, name: str, order: str) -> None:
    expected = steps(model, DynamicCache(config=model.config), ["no_grad"])
    cache = PiKVCache.for_model(model, **{**SMALL, **LOSSLESS[name]})
    for ours, theirs in zip(steps(model, cache, order.split()), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    assert_ordinary(cache)


@pytest.mark.parametrize("name", LOSSY)
def test_modes_change_nothing_of_an_approximation(model: Any, name: str) -> None:
    options = {**SMALL, **LOSSY[name]}
    expected = steps(model, PiKVCache.for_model(model, **options), ["no_grad"])
    for order in ORDERS[::3]:
        cache = PiKVCache.for_model(model, **options)
        for ours, theirs in zip(steps(model, cache, order.split()), expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-4
        assert_ordinary(cache)


@pytest.mark.parametrize("order", ORDERS)
def test_modes_change_nothing_without_attaching(model: Any, order: str) -> None:
    expected = steps(model, DynamicCache(config=model.config), ["no_grad"])
    ours = steps(model, PiKVCache(model.config, PiKVConfig(**SMALL)), order.split())
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(ours, expected, strict=True))


def test_presses_and_files_in_inference_mode(model: Any, tmp_path: Path) -> None:
    ids = prompts(1, 60)["input_ids"]

    def filled() -> PiKVCache:
        cache = PiKVCache.for_model(model, **SMALL)
        model(input_ids=ids[:, :50], past_key_values=cache)
        for layer in cache.layers:
            layer.keep(torch.arange(50).expand(1, 2, 50) % 3 > 0)
            layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
        cache.save(tmp_path / "cache")
        return PiKVCache.load(tmp_path / "cache", model)

    with torch.no_grad():
        expected = model(input_ids=ids[:, 50:], past_key_values=filled()).logits
    with torch.inference_mode():
        cache = filled()
    assert_ordinary(cache)
    assert (model(input_ids=ids[:, 50:], past_key_values=cache).logits - expected).abs().max() <= 1e-4
    for layer in cache.layers:
        # Handed out in any mode, slices that come back are a crop: no token is stored anew.
        with torch.inference_mode():
            layer.keys, layer.values = layer.keys[:, :, :20], layer.values[:, :, :20]
    assert cache.get_seq_length(0) == 20


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_an_operation_leaves_modes_as_they_were(grad: bool, inference: bool, autocast: bool) -> None:
    def modes() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    @layer_operation
    def operation(owner: Any, fails: bool) -> tuple[bool, bool, bool]:
        if fails:
            raise KeyError
        return modes()

    with torch.set_grad_enabled(grad), torch.inference_mode(inference), torch.autocast("cpu", enabled=autocast):
        before = modes()
        owner = SimpleNamespace(lock=threading.RLock())
        assert operation(owner, False) == (False, False, False)
        with pytest.raises(KeyError):
            operation(owner, True)
        assert modes() == before
