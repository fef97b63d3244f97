"""The words that programs are written in, beside those of transformers: what the lines of a program may call."""

import copy
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import VOCAB
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pikv_hf import PiKVCache, attach, detach

PAD = 0


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    """Return random token ids `(batch, length)`, none of them padding."""
    return torch.randint(2, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def _keeps() -> bool:
    try:
        DynamicLayer().crop(1)
    except ValueError:
        return False
    return True


#: Whether `crop(n)` of transformers' caches keeps n tokens: newer releases only remove some.
KEEPS = _keeps()


def crop_to(cache: Any, length: int) -> None:
    """Keep the first `length` positions, said as the installed transformers wants it."""
    seen = cache.get_seq_length()
    if KEEPS:
        cache.crop(length)
    elif length < seen:
        cache.crop(length - seen)


def repeating(length: int, seed: int) -> torch.Tensor:
    """Return a row of ids that repeat, in which prompt lookup finds something."""
    return tokens(1, 5, seed).repeat(1, length // 5 + 1)[:, :length]


def ones(batch: int, length: int) -> torch.Tensor:
    """Return a mask that shows everything, `(batch, length)`."""
    return torch.ones((batch, length), dtype=torch.long)


def padded(batch: int, length: int, side: str, seed: int) -> torch.Tensor:
    """Return a mask with padding on the left, on the right or in between; one row has none, all rows have a token."""
    generator = torch.Generator().manual_seed(seed)
    mask = ones(batch, length)
    for row in range(batch - 1 if batch > 1 else 1):
        hidden = int(torch.randint(0, length, (), generator=generator))
        if side == "left":
            mask[row, :hidden] = 0
        elif side == "right":
            mask[row, length - hidden :] = 0
        else:
            mask[row, torch.randperm(length, generator=generator)[:hidden]] = 0
    return mask


def hiding(mask: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a mask that hides some more of its columns, in each row others; the last of a row stays."""
    draws = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    return mask * ((draws < 0.7) | last).long()


def mask_4d(mask: torch.Tensor, new: int, dtype: torch.dtype, seed: int | None = None) -> torch.Tensor:
    """Return the causal mask `(batch, 1, new, length)` of the last columns over all, boolean or additive.

    Every query sees itself, also in padding. A seed hides a third of what each query would see.
    """
    batch, length = mask.shape
    queries = torch.arange(length - new, length)[:, None]
    seen = (torch.arange(length) <= queries)[None, None] & mask[:, None, None].bool()
    if seed is not None:
        seen = seen & (torch.rand((batch, 1, new, length), generator=torch.Generator().manual_seed(seed)) > 0.3)
    seen = seen | (torch.arange(length) == queries)
    return (
        seen
        if dtype == torch.bool
        else torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    )


def fork(cache: Any) -> Any:
    """Return an independent copy of a cache."""
    if isinstance(cache, PiKVCache):
        return cache.fork()
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach().clone(), layer.values.detach().clone()
    return twin


def saved_and_loaded(cache: PiKVCache, model: Any, devices: list[str] | None = None) -> PiKVCache:
    """Write a cache to a file and return what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        return PiKVCache.load(Path(folder) / "cache", model, devices=devices)


def in_threads(work: Callable[[Any, int], Any], caches: list[Any]) -> list[Any]:
    """Return the results of `work(cache, number)`, each of them in a thread of its own."""
    results: list[Any] = [None] * len(caches)

    def run(number: int) -> None:
        try:
            with torch.no_grad():
                results[number] = work(caches[number], number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class Stopped(Exception):
    """What stops a call of the model half-way."""


def stop() -> None:
    """Stop the call of the model that is under way; see :func:`during`."""
    raise Stopped


def _module_at(model: Any, place: str) -> torch.nn.Module:
    """Return the decoder layer, or its attention, of a place like `"attention 1"`."""
    kind, number = place.split()
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layer = layers[int(number)]
    attention = [module for module in layer.modules() if type(module).__name__.endswith(("Attention", "MLA"))]
    return layer if kind == "layer" else attention[-1]


def during(model: Any, place: str, what: Callable[[], Any], work: Callable[[], Any]) -> None:
    """Do some work with the model, and something else, once, when it has passed this place."""

    def once(*_: Any) -> None:
        handle.remove()
        what()

    handle = _module_at(model, place).register_forward_hook(once)
    try:
        work()
    except Stopped:
        pass
    finally:
        handle.remove()


#: What the lines of a program see, beside `model`, `cache`, `fresh`, `pikv`, `ids`, `mask`, `kept` and `show`.
_WORDS = (
    *(crop_to, tokens, repeating, ones, padded, hiding, mask_4d),
    *(fork, saved_and_loaded, in_threads, during, stop, attach, detach, DynamicCache, PiKVCache),
)
WORDS: dict[str, Any] = {"torch": torch, "copy": copy, "PAD": PAD, **{word.__name__: word for word in _WORDS}}
