"""What presses keep on a `PiKVCache`: its bytes for those of kvpress that go head by head, and this project's own.

A press of this project hands its decision to a layer, by `keep`. So a prompt is read once into one cache, every press
decides, and a fork of the cache for each is made to keep what it decided.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.runner.memory_meter import stored_bytes
from pikv_hf.eval.studies.presses.one_reading import Kept

#: Nothing outside of pages, and one shard: as in eval/presses.yaml. With one shard its placement decides nothing.
LAYOUT: dict[str, Any] = {"recent_window": 0, "sink_tokens": 0, "num_shards": 1, "placement": "hash"}


def bytes_of(model: Any, kept: Kept) -> int:
    """Return the live bytes of what a press left: on a `PiKVCache` if only that frees them."""
    if not kept.hides:
        return stored_bytes(kept.cache)
    cache = PiKVCache.for_model(model, **LAYOUT)
    for index, (layer, hidden) in enumerate(zip(kept.cache.layers, kept.hidden, strict=True)):
        cache.update(layer.keys, layer.values, index)
        if hidden is not None:
            cache.layers[index].keep(~hidden)
    return stored_bytes(cache)


@torch.no_grad()
def read_paged(model: Any, ids: torch.Tensor, presses: Mapping[Any, Any]) -> tuple[dict[Any, PiKVCache], torch.Tensor]:
    """Read a prompt `(1, T)` once; return a cache for each of these `JointPress`es of one class, as it leaves it.

    Beside them the logits `(1, V)` of the token that follows the prompt.
    """
    cache = PiKVCache.for_model(model, **LAYOUT)
    reader = next(iter(presses.values()))
    decided: dict[Any, dict[int, torch.Tensor]] = {key: {} for key in presses}

    def decide(views: Any) -> None:
        for key, press in presses.items():
            with _noting(views, decided[key]):
                type(press).press_layers(press, views)

    reader.press_layers = decide
    try:
        with reader(model):
            read = model(input_ids=ids, **cache_argument(cache), logits_to_keep=1)
    finally:
        del reader.press_layers
    return {key: _kept(cache, widths) for key, widths in decided.items()}, read.logits[:, -1]


@contextmanager
def _noting(views: Any, decided: dict[int, torch.Tensor]) -> Generator[None, None, None]:
    """Have layers note what they are to keep instead of doing it."""
    for view in views:
        view.layer.keep = lambda widths, at=view.index: decided.__setitem__(at, widths)
    try:
        yield
    finally:
        for view in views:
            del view.layer.keep


def _kept(cache: PiKVCache, decided: Mapping[int, torch.Tensor]) -> PiKVCache:
    twin = cache.fork()
    for index, widths in decided.items():
        twin.layers[index].keep(widths)
    return twin
