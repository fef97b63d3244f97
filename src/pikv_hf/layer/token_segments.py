"""Tokens of a layer out of one cache and into another, as they are stored: latents, indexer keys and experts too."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..common.kv import KV
from .input_checks import KVFormat
from .layer import PiKVLayer
from .layer_operation import layer_operation
from .pending_tokens import PendingTokens


class Segment(NamedTuple):
    """Tokens of one row that follow one another.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(n, H, D)` and `(n, H, Dv)` as the layer stores them, an indexer's keys behind the values.
    experts : torch.Tensor
        `(n,)` int16, the primary expert of each, -1 where that is not known.
    """

    keys: torch.Tensor
    values: torch.Tensor
    experts: torch.Tensor

    def first(self, tokens: int) -> "Segment":
        """Return the first tokens alone."""
        return Segment(self.keys[:tokens], self.values[:tokens], self.experts[:tokens])


@layer_operation
def segment_of(layer: PiKVLayer, start: int) -> Segment:
    """Return the tokens of a layer of one row and one part from column `start` on, decoded."""
    layer.edits.settle()
    table, stored = layer.table, layer.store.stored
    assert table is not None
    assert len(layer.parts) == 1
    keys, values = (table.view.dense_part(stored, which, start=start) for which in (KV.KEYS, KV.VALUES))
    heads = layer.store.heads
    by_token = (each.reshape(heads, stored - start, each.shape[-1]).transpose(0, 1) for each in (keys, values))
    return Segment(next(by_token), next(by_token), table.view.experts_part(stored, start)[0])


@layer_operation
def append_segment(layer: PiKVLayer, segment: Segment) -> None:
    """Append tokens to a layer of one row, or an empty one.

    Raises
    ------
    ValueError
        If they do not fit what is stored; nothing has changed then.
    """
    layer.edits.settle()
    keys, values = (each.transpose(0, 1)[None] for each in (segment.keys, segment.values))
    _append(layer, keys, values, segment.experts[None], None)


@layer_operation
def fill_rows(layer: PiKVLayer, rows: Sequence[Segment | None], columns: int) -> None:
    """Fill an empty layer with a row of each of these tokens, None for none: in the last of so many columns.

    The columns before them are padding, which is not stored.
    """
    known = next(row for row in rows if row is not None)
    keys, values = (
        each.new_zeros((len(rows), each.shape[1], columns, each.shape[2])) for each in (known.keys, known.values)
    )
    experts = known.experts.new_full((len(rows), columns), -1)
    valid = torch.zeros((len(rows), columns), dtype=torch.bool, device=keys.device)
    for number, row in enumerate(rows):
        if row is not None:
            start = columns - len(row.keys)
            keys[number, :, start:], values[number, :, start:] = row.keys.transpose(0, 1), row.values.transpose(0, 1)
            experts[number, start:], valid[number, start:] = row.experts, True
    _append(layer, keys, values, experts, None if bool(valid.all()) else valid)


def _append(
    layer: PiKVLayer, keys: torch.Tensor, values: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor | None
) -> None:
    """Store tokens `(B, H, n, D)` and `(B, H, n, Dv)`, as the layer stores them, of experts `(B, n)`."""
    store, device = layer.store, layer.store.device if layer.state.seen else keys.device
    keys, values = keys.to(device), values.to(device)
    own = values.shape[-1] - (-(-store.indexer_dim // keys.shape[1]) if store.indexer_dim else 0)
    given = KVFormat.of(keys, values[..., :own])
    if (known := store.kv_format()) is not None and known != given:
        raise ValueError(f"layer {layer.layer_idx}: K/V of {given} do not fit those that are stored, {known}")
    store.begin_if_empty(given)
    store.state.seen += keys.shape[2]
    store.pending = PendingTokens(keys, values, valid)
    try:
        store.place(experts.to(device).long())
        store.settle()
    except BaseException:
        store.pending = None
        store.state.seen -= keys.shape[2]
        raise
