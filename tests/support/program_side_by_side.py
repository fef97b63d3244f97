"""What a printed program runs with: both caches in turn, and what they show beside each other."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from program_compare import distance, pairs
from program_models import assistant_of, model_of, new_cache, quiet

import pikv_hf.page_table.table_view


def side_by_side(program: Callable[..., None], models: tuple[str, bool, str], **cache: Any) -> None:
    """Run a program on DynamicCache and on PiKVCache and print how far each shown value is apart.

    `models` are the arguments of `model_of`, `cache` those of `new_cache`.
    """
    quiet()
    # As in the tests: the pages of small models are so small that none would be read in place.
    pikv_hf.page_table.table_view.MIN_RUN_BYTES = 1
    results: list[list[Any]] = [[], []]
    for pikv, shown in enumerate(results):
        model = model_of(*models, bool(pikv))
        fresh = functools.partial(new_cache, model, bool(pikv), **cache)
        with torch.no_grad():
            program(model, fresh(), fresh, assistant_of(*models[:2]), functools.partial(_note, shown), bool(pikv))
    for (theirs, where), (ours, _) in zip(*results, strict=True):
        for name, a, b in pairs(ours, theirs, where):
            print(f"{name}: {_comparison(name, a, b)}")


def _note(shown: list[Any], value: Any, where: torch.Tensor | None = None) -> None:
    shown.append((value, where))


def _comparison(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    if name != "tokens" and ours.shape == theirs.shape:
        return f"{distance(ours, theirs):.1e} apart"
    return "same" if torch.equal(ours, theirs) else f"{ours.tolist()}, with DynamicCache {theirs.tolist()}"
