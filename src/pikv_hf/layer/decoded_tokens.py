"""Storing decoded tokens, one of each row: a write, but where a page is full or something else has to be done first."""

import torch

from .layer_part import LayerPart
from .layer_store import LayerStore
from .pending_tokens import tokens_by_lane


def is_mid_page(store: LayerStore) -> bool:
    """Return whether :meth:`LayerStore.settle` has nothing to do and :func:`append_decoded` only to write."""
    if store.pending is not None:
        return False
    for part in store.parts:
        if part.table is None or not part.table.is_mid_page:
            return False
        # Another layer may have taken pages from this one, within a budget that they share.
        if part.scheduler is not None and part.scheduler.pages_evicted and not store.state.evicted:
            return False
    return True


def append_decoded(store: LayerStore, keys: torch.Tensor, values: torch.Tensor, within_page: bool) -> None:
    """Write one decoded token per row, `(B, H, 1, D)` and `(B, H, 1, Dv)`; its expert follows from the router.

    `within_page` is what :func:`is_mid_page` has just returned.
    """
    table = store.parts[0].table
    assert table is not None
    if (lanes := len(table.rows) // keys.shape[0]) > 1:
        keys, values = tokens_by_lane(keys, lanes), tokens_by_lane(values, lanes)
    if within_page:
        _append_in_page(store, keys, values)
        return
    tables, seen = store.tables(), store.state.seen
    for part, table in zip(store.parts, tables, strict=True):
        # Until pages change hands again, as many tokens as fit into a page may come.
        part.enforce(lanes, seen, headroom=table.plain.page_size)
    if any(table.is_at_page_end for table in tables):
        store.in_all_parts(lambda part, _: part.append(keys, values, seen))
    else:
        _append_in_page(store, keys, values)
    store.note_evictions()


def _append_in_page(store: LayerStore, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write one decoded token per row where every part has a slot for it: no page changes hands."""
    done: list[LayerPart] = []
    try:
        for part in store.parts:
            part.append(keys, values, store.state.seen)
            done.append(part)
    except BaseException:
        for part in done:
            assert part.table is not None
            part.table.take_back_newest()
        raise


def record_experts(store: LayerStore, experts: torch.Tensor) -> None:
    """Note the primary experts `(B,)` of the tokens that :func:`append_decoded` has written."""
    for part in store.parts:
        part.record_experts(experts)
