"""The rows of a batch of prompts: one cache out of what is known of each, and what each has brought, back."""

from collections.abc import Sequence

import torch

from ..cache import PiKVCache
from ..layer.layer_list import paged_layers
from ..layer.token_segments import append_segment, fill_rows, segment_of


def left_padding(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int] | None:
    """Return how many columns each row begins with that are padding, None where padding is anywhere else."""
    if mask is None:
        return [0] * len(input_ids)
    if mask.shape != input_ids.shape:
        return None
    starts = mask.shape[1] - mask.long().sum(dim=1)
    shown = torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]
    is_left = bool((mask.bool() == shown).all()) and bool((starts < mask.shape[1]).all())
    return starts.tolist() if is_left else None


def joined_rows(empty: PiKVCache, caches: Sequence[PiKVCache], lengths: Sequence[int], columns: int) -> PiKVCache:
    """Fill so many columns of an empty cache with the first tokens of others of one row each, which end in the last.

    Parameters
    ----------
    empty : PiKVCache
        Of the same options; all of its layers are paged.
    caches : sequence of PiKVCache
        Left as they are.
    lengths : sequence of int
        How many tokens of each, one of them at least of any.
    columns : int
        What is before a row's tokens is padding.
    """
    empty.filled_under = next(cache.filled_under for cache, length in zip(caches, lengths, strict=True) if length)
    for index, layer in enumerate(paged_layers(empty.layers)):
        rows = [
            segment_of(paged_layers(cache.layers)[index], 0).first(length) if length else None
            for cache, length in zip(caches, lengths, strict=True)
        ]
        fill_rows(layer, rows, columns)
    return empty


def take_row(cache: PiKVCache, number: int, start: int, own: PiKVCache) -> None:
    """Append to a cache of one row the tokens of a row of another cache from column `start` on."""
    if own.filled_under is None:
        own.filled_under = cache.filled_under
    row = cache.fork()
    row.batch_select_indices([number])
    for ours, theirs in zip(paged_layers(own.layers), paged_layers(row.layers), strict=True):
        append_segment(ours, segment_of(theirs, start))
