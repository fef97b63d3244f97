"""Taking the new tokens of a call into a layer, and giving them back where the call cannot go on."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..common.tensors import detached
from ..distributed.lockstep import prompt_mark
from ..distributed.process_exchange import Exchange
from . import layer_reads
from .decoded_tokens import append_decoded
from .layer_edits import LayerEdits
from .layer_operation import layer_operation
from .layer_store import LayerStore
from .model_link import ModelLink
from .pending_tokens import PendingTokens


class TakingLayer(Protocol):
    """A :class:`~pikv_hf.layer.layer.PiKVLayer`, of which this is a part."""

    layer_idx: int
    store: LayerStore
    edits: LayerEdits
    leads: bool
    attachment: ModelLink | None
    prompt_mark: torch.Tensor | None
    exchange: Exchange | None

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pools and page tables for K/V of these shapes, where the layer has none."""


@layer_operation
def take_in(
    layer: TakingLayer, keys: torch.Tensor, values: torch.Tensor, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Store new K/V `(B, H, Q, D)` and `(B, H, Q, Dv)`, or have them wait for their experts.

    Returns the dense history before them, None if there is none or PiKV's attention reads it `in_place`.
    """
    store, edits, state, new = layer.store, layer.edits, layer.store.state, keys.shape[2]
    if layer.leads and layer.exchange is not None and (new > 1 or not state.seen):
        layer.prompt_mark = prompt_mark(keys)
    awaits_press = edits.awaits_press
    within_page = edits.settle_within()
    joint = edits.joint
    if joint is not None and new == 1 and state.seen and not within_page:
        joint.make_room(edits)
    if not state.seen:
        layer.lazy_initialization(keys, values)
    link = layer.attachment
    if link is not None and not (state.seen or in_place) and link.changes_keys(layer.layer_idx):
        # No reference has reached attention: the next call gets all K/V.
        state.reference_lost = True
    if edits.snapshot_due:
        # It shares the pages.
        edits.take_requested_snapshot()
        within_page = False
    past = layer_reads.dense_history(store) if state.seen and not in_place else None
    if new == 1 and state.seen and not store.indexer_dim:
        append_decoded(store, keys, values, within_page)
        state.seen += 1
        return past
    # It may be kept as it is.
    keys, values = detached(keys), detached(values)
    if store.indexer_dim:
        room = torch.nn.functional.pad(values, (0, store.indexer_width))
        store.pending = PendingTokens(keys, room, awaits_indexer=True)
    else:
        # Only PiKV's attention tells when it has read the tokens, and passes over what was evicted.
        waits = joint is not None and in_place and joint.begins(edits, new, awaits_press)
        store.pending = PendingTokens(keys, values)
        edits.awaits_press = awaits_press or waits
    state.seen += new
    return past


@layer_operation
def take_back(layer: TakingLayer, new: int) -> None:
    """Undo :func:`take_in` of so many tokens."""
    store = layer.store
    if store.pending is not None or all(table.take_back_newest() for table in store.tables()):
        store.pending = None
        store.state.seen -= new
    else:
        layer.edits.truncate(store.state.seen - new)
