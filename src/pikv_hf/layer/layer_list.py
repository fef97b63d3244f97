"""The layers of a cache, paged ones and transformers' own sliding ones, as one: their rows, and cutting them back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .layer import PiKVLayer
from .layer_cropping import column_of, cropped_length
from .sliding_layer import check_can_crop, is_recording, trim_to_tokens, undone_on_error


def row_count(layers: Sequence[Any]) -> int | None:
    """Return how many sequences the layers hold, None before the first tokens."""
    for layer in layers:
        if isinstance(layer, PiKVLayer) and layer.table is not None:
            return layer.batch
        if not isinstance(layer, PiKVLayer) and layer.is_initialized:
            return int(layer.keys.shape[0])
    return None


def dense_layers(
    layers: Sequence[Any],
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """Yield what :meth:`pikv_hf.PiKVCache.__iter__` does."""
    for index, layer in enumerate(layers):
        if isinstance(layer, PiKVLayer) and (layer.state.evicted or layer.store.is_padded):
            what = "tokens were evicted" if layer.state.evicted else "padding was left out"
            raise ValueError(f"layer {index}: {what}, dense K/V would have zeros in their place")
        yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)


def select_rows(layers: Sequence[Any], indices: torch.Tensor) -> None:
    """Replace the sequences by those at `indices`, integers in any order: of all layers, or of none if one fails.

    Nothing happens before the first tokens.

    Raises
    ------
    IndexError
        If there is no such row; nothing has changed then.
    """
    rows = row_count(layers)
    if rows is None:
        return
    chosen = indices.tolist()
    if bad := [index for index in chosen if not 0 <= index < rows]:
        raise IndexError(f"row {bad[0]} is out of range for a cache of {rows} rows")
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, PiKVLayer):
                stack.enter_context(layer.edits.selecting(chosen))
            elif layer.is_initialized:
                stack.enter_context(undone_on_error(layer))
                layer.batch_select_indices(indices.to(layer.keys.device))
    _give_back(layers)


def crop_layers(layers: Sequence[Any], seen: int, max_length: int) -> None:
    """Cut layers that have seen `seen` positions back, all or none; see :meth:`pikv_hf.PiKVCache.crop`."""
    length = cropped_length(seen, max_length)
    for layer in layers:
        if isinstance(layer, PiKVLayer):
            # A call that was interrupted before it brought its tokens will bring none.
            layer.called = False
    # After an interrupted call some layers have more positions than others, whose length is right already.
    longer = [(i, layer) for i, layer in enumerate(layers) if _positions(layer) > length or is_recording(layer)]
    if not longer:
        return
    for index, layer in longer:
        if isinstance(layer, PiKVLayer):
            column_of(layer.store, length)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            check_can_crop(index, layer, length)
    with ExitStack() as stack:
        for _, layer in longer:
            if isinstance(layer, PiKVLayer):
                stack.enter_context(layer.edits.truncating(column_of(layer.store, length)))
            else:
                stack.enter_context(undone_on_error(layer))
                layer.crop(min(0, length - layer.get_seq_length()))
    _give_back(layers)


def _positions(layer: Any) -> int:
    return int(layer.state.positions_seen if isinstance(layer, PiKVLayer) else layer.get_seq_length())


def _give_back(layers: Sequence[Any]) -> None:
    """Give back the memory of what layers have let go of."""
    for layer in layers:
        if isinstance(layer, PiKVLayer):
            layer.edits.give_back()
        elif isinstance(layer, DynamicSlidingWindowLayer):
            trim_to_tokens(layer)
