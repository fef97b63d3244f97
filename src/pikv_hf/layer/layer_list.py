"""The layers of a cache, paged ones and transformers' own, as one: their rows, and cutting them back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .input_checks import KVFormat, check_not_padded
from .joint_budget import join_budgets
from .layer import PiKVLayer
from .layer_cropping import column_of, cropped_length
from .layer_reads import check_not_evicted
from .own_layer import check_can_crop, copied, crop_layer, has_positions, rows_of, select_rows_of, undone_on_error
from .sliding_layer import kv_format, trim_to_tokens


def paged_layers(layers: Sequence[Any]) -> list[PiKVLayer]:
    """Return the paged ones of the layers of a cache."""
    return [layer for layer in layers if isinstance(layer, PiKVLayer)]


def complete_assignments(layers: Sequence[Any]) -> None:
    """Have all keys that were assigned alone count before the first layer gets new tokens, or refuse them all."""
    for layer in paged_layers(layers):
        if layer.edits.assignment.staged is not None:
            layer.edits.complete_assignment()


def format_of(layer: Any) -> KVFormat | None:
    """Return what new K/V of a layer must be like, None for one that is empty or knows none."""
    if isinstance(layer, PiKVLayer):
        return layer.kv_format()
    return kv_format(layer) if isinstance(layer, DynamicSlidingWindowLayer) else None


def check_read_from_outside(layers: Sequence[Any]) -> None:
    """Refuse tokens that the attached model's attention does not bring, before the first layer has got any.

    Raises
    ------
    ValueError
        If padding was left out.
    RuntimeError
        If tokens were evicted, or the last call was interrupted.
    """
    for layer in paged_layers(layers):
        check_not_padded(layer.layer_idx, layer.store.is_padded)
        check_not_evicted(layer.store)
        layer.reference.check_history_was_read()


def row_count(layers: Sequence[Any]) -> int | None:
    """Return how many sequences the layers hold, None before the first tokens."""
    for layer in layers:
        if isinstance(layer, PiKVLayer) and layer.table is not None:
            return layer.batch
        if not isinstance(layer, PiKVLayer) and (rows := rows_of(layer)) is not None:
            return rows
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


def fork_layers(layers: Sequence[Any]) -> list[Any]:
    """Return copies of the layers of a cache that share their pages until either side writes to them."""
    twins = [layer.fork() if isinstance(layer, PiKVLayer) else copied(layer) for layer in layers]
    join_budgets(twins)
    return twins


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
    for layer in paged_layers(layers):
        layer.edits.settle_marks()
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, PiKVLayer):
                stack.enter_context(layer.edits.selecting(chosen))
            else:
                stack.enter_context(undone_on_error(layer))
                select_rows_of(layer, indices)
    _give_back(layers)
    for layer in paged_layers(layers):
        if layer.edits.joint is not None:
            # Of more rows more is kept beside the pages. What there is no memory for now is done with the next token.
            with suppress(MemoryError, torch.OutOfMemoryError):
                layer.edits.joint.make_room(layer.edits)


def crop_layers(layers: Sequence[Any], seen: int, max_length: int) -> None:
    """Cut layers that have seen `seen` positions back, all or none; see :meth:`pikv_hf.PiKVCache.crop`."""
    length = cropped_length(seen, max_length)
    for layer in layers:
        if isinstance(layer, PiKVLayer) and layer.attachment is not None:
            # A call that Ctrl-C ended before it brought its tokens will bring none.
            layer.attachment.takes_update(layer)
    # After an interrupted call some layers have more positions than others, whose length is right already. States do
    # not count any.
    positions = [_positions(layer) for layer in layers]
    most = max((count for count in positions if count is not None), default=0)
    removed = [max(0, (most if count is None else count) - length) for count in positions]
    cropped = list(zip(layers, removed, strict=True))
    columns = [column_of(layer.store, length) if isinstance(layer, PiKVLayer) else 0 for layer in layers]
    for index, (layer, count) in enumerate(cropped):
        if not isinstance(layer, PiKVLayer):
            check_can_crop(index, layer, count, length)
    _make_ready(
        [(layer, at) for layer, at, count in zip(layers, columns, removed, strict=True) if count and _is_paged(layer)]
    )
    with ExitStack() as stack:
        for (layer, count), column in zip(cropped, columns, strict=True):
            if not isinstance(layer, PiKVLayer):
                stack.enter_context(undone_on_error(layer))
                crop_layer(layer, count)
            elif count:
                stack.enter_context(layer.edits.truncating(column))
                if not length:
                    layer.state.dropped = 0
    _give_back(layers)


def _is_paged(layer: Any) -> bool:
    return isinstance(layer, PiKVLayer)


def _make_ready(cropped: Sequence[tuple[PiKVLayer, int]]) -> None:
    """Store what crops to these columns need stored, and have room for them, before the first of them begins.

    Layers that share a budget evict of one another, which may take the room that was made before: until none does.
    """
    before = None
    while (evicted := sum(layer.edits.pages_evicted for layer, _ in cropped)) != before:
        before = evicted
        for layer, column in cropped:
            layer.edits.make_ready(column)


def _positions(layer: Any) -> int | None:
    """Return how many positions a layer has seen, None if it does not count them."""
    if isinstance(layer, PiKVLayer):
        return layer.state.positions_seen
    return int(layer.get_seq_length()) if has_positions(layer) else None


def _give_back(layers: Sequence[Any]) -> None:
    """Give back the memory of what layers have let go of."""
    for layer in layers:
        if isinstance(layer, PiKVLayer):
            layer.edits.give_back()
        elif isinstance(layer, DynamicSlidingWindowLayer):
            trim_to_tokens(layer)
