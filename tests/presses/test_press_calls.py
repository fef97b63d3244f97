"""A press that finds nothing to act on says so: at the end of its block, unless that fails by itself or is empty."""

from typing import Any

import kvpress
import pytest
import torch
from families import FAMILIES
from press_runs import PRESSES, attached, ids_of, read, shared_model
from transformers import DynamicCache

from pikv_hf.integration.latent_attention import expands_latents
from pikv_hf.presses import QueryAwarePress, RowwisePress, base_press, rowwise_press

BLOCKS = {**PRESSES, "rowwise": lambda **given: RowwisePress(kvpress.KnormPress(**given))}


@torch.no_grad()
def without_cache(model: Any, press: Any, error: Exception | None = None) -> None:
    with press(model):
        model(ids_of(40), use_cache=False)
        if error is not None:
            raise error


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_without_a_cache_is_an_error_at_the_end_of_the_block(name: str) -> None:
    model = shared_model()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"Press had nothing to press: of 3 attention calls .* none had a cache"):
        without_cache(model, BLOCKS[name](compression_ratio=0.5))
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("name", BLOCKS)
def test_a_cache_whose_name_nobody_knows_is_an_error_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the first release that called it otherwise: presses did nothing, and said nothing."""
    model = shared_model()
    for module in (base_press, rowwise_press):
        monkeypatch.setattr(module, "cache_of_call", lambda kwargs: None)
    monkeypatch.setattr("pikv_hf.presses.press_calls.cache_of_call", lambda kwargs: None)
    with pytest.raises(RuntimeError, match="nothing to press"):
        read(model, DynamicCache(), ids_of(40), BLOCKS[name](compression_ratio=0.5))


def test_a_block_that_fails_has_its_own_error() -> None:
    model = shared_model()
    with pytest.raises(KeyError, match="on purpose"):
        without_cache(model, QueryAwarePress(0.5), KeyError("on purpose"))


@pytest.mark.parametrize("name", BLOCKS)
def test_an_empty_block_has_nothing_to_press(name: str) -> None:
    with BLOCKS[name](compression_ratio=0.5)(shared_model()):
        pass


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), attached])
def test_decoding_is_something(make: Any) -> None:
    model = shared_model()
    cache = read(model, make(model), ids_of(40))
    read(model, cache, ids_of(1), QueryAwarePress(0.5))
    assert cache.get_seq_length() == 41


@pytest.mark.parametrize("name", PRESSES)
def test_latents_are_refused(name: str) -> None:
    model = FAMILIES["deepseek_v3"].build()
    if not any(expands_latents(type(module)) for module in model.modules()):
        pytest.skip("this transformers caches the keys and values of all heads, which presses score")
    with pytest.raises(NotImplementedError, match="DeepseekV3Attention is latent attention"):
        without_cache(model, PRESSES[name](compression_ratio=0.5))
