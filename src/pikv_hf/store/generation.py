"""Generating with the longest known prefixes of prompts."""

import inspect
import time
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from ..cache import PiKVCache
from ..common.tensors import is_out_of_memory
from ..common.transformers_release import cache_argument, cache_of_call
from ..integration.model_modules import unwrapped
from ..layer.layer_list import row_count
from .prompt_rows import joined_rows, left_padding, take_row

#: Arguments of `generate` that say nothing of K/V, beside the fields of its configuration.
_HARMLESS = {
    *("attention_mask", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
    *("synced_gpus", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask"),
    *vars(GenerationConfig()),
}
#: Ways to decode that may not go on from a cache with tokens: of drafts the first call is wrong in transformers 5.24.
_OTHER_LOOPS = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type"),
    *("custom_generate", "dola_layers", "penalty_alpha", "constraints", "force_words_ids", "token_healing"),
)


class Store(Protocol):
    """What generation uses of a store of contexts."""

    model: Any
    checkpoints: int | None
    joins_rows: bool

    def has_press(self) -> bool:
        """Return whether a press is at work."""

    def new(self) -> PiKVCache:
        """Return an empty cache."""

    def look_up(self, input_ids: torch.Tensor, most: int | None = None) -> tuple[PiKVCache, int, int]:
        """Return a cache with the longest known prefix, its length, and how many tokens are known at all."""

    def put(self, input_ids: torch.Tensor, cache: PiKVCache) -> bool:
        """Remember what a cache holds."""

    def count_prompt(self, known: int, tokens: int, common: int) -> None:
        """Count a prompt."""

    def count_read(self, known: int, tokens: int, seconds: float) -> None:
        """Note how long reading took."""

    def count_not_reusable(self, prompts: int) -> None:
        """Note prompts that the store was not asked for."""


def generate_with(store: Store, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Generate with the longest known prefixes; see :meth:`pikv_hf.ContextStore.generate`."""
    if (cache := cache_of_call(kwargs)) is not None:
        raise TypeError(f"generate() of a store brings a cache of its own, got a {type(cache).__name__}")
    setting = _Setting(store.model, kwargs)
    if (kind := setting["cache_implementation"]) is not None or setting["use_cache"] is False:
        asked = "use_cache=False" if kind is None else f"cache_implementation={kind!r}"
        raise TypeError(f"generate() of a store brings a cache of its own, got {asked}")
    starts = None if store.has_press() else _reusable(input_ids, kwargs, setting)
    alike = starts is not None and not any(starts) and bool((input_ids == input_ids[:1]).all())
    if starts is None or not (alike or store.joins_rows):
        store.count_not_reusable(input_ids.shape[0])
        return store.model.generate(input_ids, **kwargs)
    chunk = setting["prefill_chunk_size"]
    cache = _one_prompt(store, input_ids[:1], chunk) if alike else _several_prompts(store, input_ids, starts, chunk)
    repeats = (len(input_ids) if alike else 1) * max(setting["num_beams"] or 1, setting["num_return_sequences"] or 1)
    if repeats > 1:
        # `generate` repeats the rows of its prompts, not those of a cache.
        cache.batch_repeat_interleave(repeats)
    # Chunks would begin with what the cache has.
    rest = kwargs | {"prefill_chunk_size": None} if chunk else kwargs
    output = store.model.generate(input_ids, **rest, **cache_argument(cache))
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    is_one = len(sequences) == 1 and not any(starts) and row_count(cache.layers) == 1
    if is_one and len(sequences[0]) > cache.get_seq_length():
        # Beams are reordered until the end, and of several rows none is the context.
        _remember(store, sequences, cache)
    return output


def _one_prompt(store: Store, row: torch.Tensor, chunk: int | None) -> PiKVCache:
    """Return a cache of one row that has read a prompt `(1, n)` up to its last token."""
    cache, known, common = store.look_up(row, row.shape[1] - 1)
    store.count_prompt(known, row.shape[1], common)
    _read(store, cache, row, [0], known, chunk)
    _remember(store, row, cache)
    return cache


def _several_prompts(store: Store, input_ids: torch.Tensor, starts: list[int], chunk: int | None) -> PiKVCache:
    """Return a cache of rows that have read prompts `(B, n)`, padded on the left, up to their last token.

    They go on together from the column up to which all of them are known.
    """
    rows = [input_ids[number : number + 1, start:] for number, start in enumerate(starts)]
    found = [store.look_up(row, row.shape[1] - 1) for row in rows]
    columns = min(start + known for start, (_, known, _) in zip(starts, found, strict=True))
    lengths = [max(0, columns - start) for start in starts]
    for row, length, (_, known, common) in zip(rows, lengths, found, strict=True):
        store.count_prompt(length, row.shape[1], common - known + length)
    caches = [cache for cache, _, _ in found]
    reused = any(lengths)
    cache = joined_rows(store.new(), caches, lengths, columns) if reused else store.new()
    _read(store, cache, input_ids, starts, columns if reused else 0, chunk)
    for number, (own, known, _) in enumerate(found):
        if starts[number] + known < input_ids.shape[1] - 1:
            take_row(cache, number, starts[number] + known, own)
            _remember(store, rows[number], own)
    return cache


def _remember(store: Store, tokens: torch.Tensor, cache: PiKVCache) -> None:
    """Put a context into the store; an answer is not lost because it cannot be remembered, but a warning says so."""
    try:
        store.put(tokens, cache)
    except (MemoryError, RuntimeError, ValueError) as error:
        # What the store refuses, as after another thread has switched adapters, is no reason either.
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        warnings.warn(f"{tokens.shape[1]} tokens are not remembered: {error}", stacklevel=4)


class _Setting:
    """What a call of `generate` was given, or else the model's own configuration says, by name; None if neither."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self._kwargs = kwargs
        # transformers fills what a given one leaves open from the model's.
        self._configs = [kwargs.get("generation_config"), unwrapped(model).generation_config]

    def __getitem__(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        return next((found for each in self._configs if (found := getattr(each, name, None)) is not None), None)


def _reusable(input_ids: Any, kwargs: dict[str, Any], setting: _Setting) -> list[int] | None:
    """Return where each row begins, None unless token ids say what K/V are, and `generate` goes on from a cache.

    Rows are padded on the left alone, and there are no other inputs and no other loops than sampling and beams.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        return None
    if kwargs.get("attention_mask") is None:
        # `generate` takes such tokens for padding, unless they end texts too.
        pad, ends = setting["pad_token_id"], setting["eos_token_id"]
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is not None and pad not in ends and bool((input_ids == pad).any()):
            return None
    usual = GenerationConfig()
    if any(setting[name] not in (None, False, getattr(usual, name, None)) for name in _OTHER_LOOPS):
        return None
    if any(value is not None and name not in _HARMLESS for name, value in kwargs.items()):
        return None
    return left_padding(input_ids, kwargs.get("attention_mask"))


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(unwrapped(model).forward).parameters


@torch.no_grad()
def _read(
    store: Store, cache: PiKVCache, input_ids: torch.Tensor, starts: list[int], known: int, chunk: int | None
) -> None:
    """Read prompts `(B, n)` up to their last token; the cache has the first `known` columns.

    The columns of a row before its own of `starts` are padding.
    """
    last, began = input_ids.shape[1] - 1, time.perf_counter()
    if not last:
        return
    step = min(chunk or last, last)
    # Of none of them a logit is wanted, and those of all take more memory than the cache.
    last_logits = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(store.model) else {}
    every = store.checkpoints or last
    columns = torch.arange(last, device=input_ids.device)
    mask = (columns >= torch.tensor(starts, device=input_ids.device)[:, None]).long()
    at = known
    for end in sorted({*range(known + step, last, step), *range(every, last, every), last}):
        if end <= at:
            continue
        given: dict[str, Any] = {"attention_mask": mask[:, :end], "use_cache": True, **last_logits}
        if any(starts):
            given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, at:end]
        store.model(input_ids[:, at:end], **given, **cache_argument(cache))
        if store.checkpoints and end % every == 0:
            _remember(store, input_ids, cache)
        at = end
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    store.count_read(known * len(starts), (last - known) * len(starts), time.perf_counter() - began)
