"""Rows that callers name in all the ways in which DynamicCache can be indexed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument

ROWS = 3
#: With those that no cache takes.
INDICES: dict[str, Any] = {
    "list": [0, 2],
    "repeated": [2, 0, 2],
    "negative": [-1, 0],
    "bools": [True, False, True],
    "tuple": (2, 1),
    "range": range(2),
    "slice": slice(0, 2),
    "step": slice(None, None, 2),
    "array": np.array([1, 0]),
    "int32": torch.tensor([1, 0], dtype=torch.int32),
    "mask": torch.tensor([False, True, True]),
    "no rows left out": slice(None),
    "too large": [3],
    "too few bools": [True, False],
    "floats": [0.5],
    "text": "all",
}
#: After which DynamicCache has lost the dimension of its batch, or got another.
NOT_ROWS: dict[str, Any] = {"number": 1, "scalar": torch.tensor(1), "matrix": torch.zeros(2, 2).long(), "none": None}
BEAMS: list[Any] = [
    *(torch.tensor([2, 0]), torch.tensor([1, 1, 0], dtype=torch.int32), torch.tensor(2)),
    *(torch.tensor([True, False, True]), torch.tensor([0.0]), torch.zeros(1, 1).long()),
    *([2, 0], (1,), 1, slice(0, 2), None),
]
CALLS: dict[str, Callable[[Any], Any]] = {"cache": lambda cache: cache, "layer": lambda cache: cache.layers[0]}


@torch.no_grad()
def both(family: str) -> tuple[Any, Any]:
    """Return a filled DynamicCache and a PiKVCache with the same tokens."""
    model = FAMILIES[family].build()
    reference = DynamicCache(config=model.config)
    model(prompts(ROWS, 20)["input_ids"], **cache_argument(reference))
    cache = PiKVCache.for_model(model, page_size=8, recent_window=8)
    model(prompts(ROWS, 20)["input_ids"], **cache_argument(cache))
    return reference, cache


def keys_of(cache: Any) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.layers]


# A layer that slides is transformers' own.
@pytest.mark.parametrize(("family", "called"), [("mixtral", "cache"), ("mixtral", "layer"), ("gpt_oss", "cache")])
@pytest.mark.parametrize("name", INDICES)
def test_rows_are_chosen_as_in_dynamic_cache(family: str, name: str, called: str) -> None:
    reference, cache = both(family)
    try:
        CALLS[called](reference).batch_select_indices(INDICES[name])
    except Exception:
        before = keys_of(cache)
        with pytest.raises((IndexError, TypeError)):
            CALLS[called](cache).batch_select_indices(INDICES[name])
        assert all(map(torch.equal, before, keys_of(cache)))
        return
    CALLS[called](cache).batch_select_indices(INDICES[name])
    for ours, theirs in zip(keys_of(cache), keys_of(reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("called", CALLS)
@pytest.mark.parametrize("name", NOT_ROWS)
def test_what_is_no_choice_of_rows(name: str, called: str) -> None:
    _, cache = both("mixtral")
    before = keys_of(cache)
    with pytest.raises(TypeError, match="batch_select_indices takes rows as"):
        CALLS[called](cache).batch_select_indices(NOT_ROWS[name])
    assert all(map(torch.equal, before, keys_of(cache)))


@pytest.mark.parametrize("called", CALLS)
@pytest.mark.parametrize("given", BEAMS, ids=str)
def test_beams_are_reordered_as_in_dynamic_cache(given: Any, called: str) -> None:
    reference, cache = both("mixtral")
    try:
        CALLS[called](reference).reorder_cache(given)
    except Exception:
        with pytest.raises(TypeError, match="reorder_cache takes a vector"):
            CALLS[called](cache).reorder_cache(given)
        return
    CALLS[called](cache).reorder_cache(given)
    for ours, theirs in zip(keys_of(cache), keys_of(reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
