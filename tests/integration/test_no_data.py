"""Tensors of a shape alone, by which people estimate memory: pages cannot store them, and say so before all else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach

IDS = torch.randint(2, 198, (2, 9), generator=torch.Generator().manual_seed(0))
REFUSAL = r"layer 0: .*no data .*FakeTensorMode.*DynamicCache"
MAKE: dict[str, Callable[[Any], PiKVCache]] = {
    "attached": lambda model: PiKVCache.for_model(model, placement="hash"),
    "config alone": lambda model: PiKVCache(model.config),
}


def call(model: Any, cache: Any, masked: bool) -> Any:
    """Call a model within `FakeTensorMode`."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        mask = mode.from_tensor(torch.ones(2, cache.get_seq_length() + 9, dtype=torch.long)) if masked else None
        return model(mode.from_tensor(IDS), attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("make", MAKE)
@torch.no_grad()
def test_fake_tensors_are_refused(make: str, filled: bool, masked: bool) -> None:
    model = FAMILIES["llama"].build()
    cache = MAKE[make](model)
    if filled:
        model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=REFUSAL):
        call(model, cache, masked)
    assert {layer.get_seq_length() for layer in cache.layers} == {9 if filled else 0}
    expected = DynamicCache(config=model.config)
    for _ in range(2 if filled else 1):
        logits = model(IDS, past_key_values=expected).logits
    assert (model(IDS, past_key_values=cache).logits - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("make", MAKE)
def test_the_meta_device_is_refused(make: str) -> None:
    cache = MAKE[make](FAMILIES["llama"].build())
    empty = torch.empty(2, 2, 9, 16, device="meta")
    with pytest.raises(ValueError, match=REFUSAL):
        cache.update(empty, empty, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_attached_model_runs_with_other_caches(masked: bool) -> None:
    model = FAMILIES["llama"].build()
    attach(model, "hash")
    cache = DynamicCache(config=model.config)
    for _ in range(2):
        assert call(model, cache, masked).shape == (2, 9, 199)
