"""Generating with the longest known prefix of a prompt."""

import inspect
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..cache import PiKVCache
from ..common.transformers_release import CACHE_ARGUMENT, cache_argument
from ..integration.model_modules import unwrapped

#: Arguments of `generate` with tensors that say nothing of K/V.
_HARMLESS = ("attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask", "streamer")
_CACHES = ("past_key_values", "cache", CACHE_ARGUMENT)
#: Of drafts, whose first call some releases of transformers (5.24) get wrong over a cache that has tokens.
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
#: What makes `generate` itself choose a cache.
_CHOICES = ("cache_implementation", "use_cache", "cache_config")


class Store(Protocol):
    """What generation uses of a store of contexts."""

    model: Any
    checkpoints: int | None

    def get(self, input_ids: torch.Tensor, *, most: int | None = None) -> tuple[PiKVCache, int]:
        """Return a cache with the longest known prefix."""

    def put(self, input_ids: torch.Tensor, cache: PiKVCache) -> bool:
        """Remember what a cache holds."""

    def count_read(self, known: int, tokens: int, seconds: float) -> None:
        """Note how long reading took."""

    def count_not_reusable(self, prompts: int) -> None:
        """Note prompts that the store was not asked for."""


def generate_with(store: Store, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Generate with the longest known prefix; see :meth:`pikv_hf.ContextStore.generate`."""
    if given := [name for name in (*_CACHES, *_CHOICES) if kwargs.get(name) is not None]:
        raise TypeError(f"generate() of a store brings a cache of its own, got {given[0]}={kwargs[given[0]]!r}")
    setting = _Setting(store.model, kwargs)
    if not _is_reusable(input_ids, kwargs, setting):
        store.count_not_reusable(input_ids.shape[0])
        return store.model.generate(input_ids, **kwargs)
    row = input_ids[:1]
    cache, known = store.get(row, most=row.shape[1] - 1)
    _read(store, cache, row, known, setting["prefill_chunk_size"])
    store.put(row, cache)
    if (rows := len(input_ids) * max(setting["num_beams"] or 1, setting["num_return_sequences"] or 1)) > 1:
        # `generate` repeats the rows of its prompts, not those of a cache.
        cache.batch_repeat_interleave(rows)
    # Chunks would begin with what the cache has.
    rest = kwargs | {"prefill_chunk_size": None} if setting["prefill_chunk_size"] else kwargs
    output = store.model.generate(input_ids, **rest, **cache_argument(cache))
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    if len(sequences) == 1 and len(sequences[0]) > cache.get_seq_length() >= row.shape[1] and _is_one_row(cache):
        # Beams are reordered until the end, and of several rows none is the context.
        store.put(sequences, cache)
    return output


class _Setting:
    """What a call of `generate` was given, or else the model's own configuration says, by name; None if neither."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self._kwargs = kwargs
        self._config = kwargs.get("generation_config") or unwrapped(model).generation_config

    def __getitem__(self, name: str) -> Any:
        return self._kwargs.get(name, getattr(self._config, name, None))


def _is_one_row(cache: PiKVCache) -> bool:
    layers = [layer for layer in cache.layers if getattr(layer, "batch", None) is not None]
    return all(layer.batch == 1 for layer in layers)


def _is_reusable(input_ids: Any, kwargs: dict[str, Any], setting: _Setting) -> bool:
    """Return whether token ids alone say what K/V are, and `generate` goes on from a cache with them.

    Rows are equal and not padded, there are no other inputs, and no drafts.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape or not bool((input_ids == input_ids[:1]).all()):
        return False
    mask = kwargs.get("attention_mask")
    if mask is None:
        # `generate` takes such tokens for padding, unless they end texts too.
        pad, ends = setting["pad_token_id"], setting["eos_token_id"]
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is not None and pad not in ends and bool((input_ids == pad).any()):
            return False
    elif mask.shape != input_ids.shape or not bool((mask == 1).all()):
        return False
    if any(setting[name] is not None for name in _DRAFTS):
        return False
    return not any(_may_matter(name, value) for name, value in kwargs.items() if name not in _HARMLESS)


def _may_matter(name: str, value: Any) -> bool:
    if name == "token_type_ids":
        return not isinstance(value, torch.Tensor) or bool(value.any())
    if isinstance(value, (list, tuple)):
        return any(_may_matter(name, each) for each in value)
    return isinstance(value, torch.Tensor)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(unwrapped(model).forward).parameters


@torch.no_grad()
def _read(store: Store, cache: PiKVCache, row: torch.Tensor, known: int, chunk: int | None) -> None:
    """Read a prompt `(1, n)` up to its last token, of which `known` have been read."""
    last, started = row.shape[1] - 1, time.perf_counter()
    step = min(chunk or last, last)
    # Of none of them a logit is wanted, and those of all take more memory than the cache.
    last_logits = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(store.model) else {}
    every = store.checkpoints or last
    ends = sorted({*range(known + step, last, step), *range(every, last, every), last})
    start = known
    for end in [end for end in ends if end > known]:
        mask = torch.ones((1, end), dtype=torch.long, device=row.device)
        store.model(row[:, start:end], attention_mask=mask, use_cache=True, **last_logits, **cache_argument(cache))
        if store.checkpoints and end % every == 0:
            store.put(row, cache)
        start = end
    if row.is_cuda:
        torch.cuda.synchronize(row.device)
    store.count_read(known, last - known, time.perf_counter() - started)
