"""Measure the bytes that a cache keeps alive, what `DynamicCache` would hold, and peak memory of the process."""

import contextlib
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.common.transformers_release import cache_argument

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_BF16_BYTES = 2


def stored_bytes(cache: Any) -> int:
    """Return the bytes of the distinct storages that a cache keeps alive, whatever its kind.

    A view counts with the whole storage behind it, packed integers with their scales, a page pool with its free pages
    and tables. What a press keeps elsewhere, such as kvpress's lists of masked tokens, is not part of the cache. Of a
    cache that several processes keep together it is the sum, for which all of them must call this.
    """
    if isinstance(cache, PiKVCache):
        return cache.total_nbytes
    return live_bytes(_tensors(cache.layers, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the plain tensors within nested containers, objects and tensor subclasses."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        # A subclass, as quantising libraries have them, is a shell: its data is in the tensors it is flattened to.
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        yield from _inside((getattr(value, name) for name in names), seen) if names else (value,)
    elif isinstance(value, dict):
        yield from _inside(value.values(), seen)
    elif isinstance(value, list | tuple):
        yield from _inside(value, seen)
    elif type(value).__module__.startswith(("transformers.cache_utils", "pikv_hf")):
        yield from _inside(vars(value).values(), seen)


def _inside(values: Iterable[Any], seen: set[int]) -> Iterator[torch.Tensor]:
    for value in values:
        yield from _tensors(value, seen)


@dataclass(frozen=True, slots=True)
class DynamicFootprint:
    """What `DynamicCache` holds for a model, by number of tokens.

    Attributes
    ----------
    layers : tuple of (int, int or None)
        Per layer: elements of K and V per token, and the most tokens kept (None for all).
    dtype_bytes : int
        Bytes per element in the model's own dtype.
    """

    layers: tuple[tuple[int, int | None], ...]
    dtype_bytes: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> "DynamicFootprint":
        """Read two tokens with a `DynamicCache` and look at what it stored: right for any attention layout."""
        cache, tokens = DynamicCache(config=model.config), 2
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), **cache_argument(cache))
        layers = tuple(
            # A sliding layer keeps what the next token may look back on: the window less that token.
            ((layer.keys.numel() + layer.values.numel()) // tokens, window - 1 if window else None)
            for layer in cache.layers
            for window in [getattr(layer, "sliding_window", None)]
        )
        return cls(layers, cache.layers[0].keys.element_size())

    def bf16_bytes(self, tokens: int) -> int:
        """Return what it holds for a sequence of `tokens` in bf16, the measure of all tables."""
        return self._elements(tokens) * _BF16_BYTES

    def own_bytes(self, tokens: int) -> int:
        """Return what it holds for a sequence of `tokens` in the model's dtype."""
        return self._elements(tokens) * self.dtype_bytes

    def _elements(self, tokens: int) -> int:
        return sum(each * (tokens if most is None else min(tokens, most)) for each, most in self.layers)


class PeakMemory:
    """Highest memory of this process, and of its GPU, since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def reset(self) -> None:
        """Start anew. Where the system cannot do that, the process's figure is the highest since it began."""
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        with contextlib.suppress(OSError):
            # 5 resets the peak resident set size, see proc(5).
            _CLEAR_REFS.write_text("5")

    def process_bytes(self) -> int:
        """Return the peak resident set size."""
        try:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            # Kilobytes, but bytes on macOS, see getrusage(2).
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def cuda_bytes(self) -> int | None:
        """Return the peak of allocated GPU memory, None without a GPU."""
        return None if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
