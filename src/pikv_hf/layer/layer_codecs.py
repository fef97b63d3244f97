"""What the encoders of a layer are told: which codecs, with which bases, and the queries by which they judge errors."""

import dataclasses
from typing import Any

import torch

from ..page_table.layer_encoders import MAX_ERROR_QUERIES
from .layer_operation import layer_operation
from .layer_store import LayerStore

# By the queries at so many of the newest positions the errors of packed keys are judged; at most MAX_ERROR_QUERIES are.
ERROR_QUERY_POSITIONS = 8


@layer_operation
def recode(
    store: LayerStore,
    key_basis: torch.Tensor | None = None,
    value_basis: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """Choose the codecs anew, before a token is stored.

    Parameters
    ----------
    store : LayerStore
        Of the layer.
    key_basis, value_basis : torch.Tensor, optional
        `(H, D, rank)`, what low-rank codecs would otherwise fit to the first pages.
    **options
        `key_codec`, `value_codec`, `error_budget`, `rank`: see :class:`PiKVConfig`.

    Raises
    ------
    ValueError
        If tokens are stored; what is pending does not count.
    """
    stored = [max(table.tokens(), default=0) for table in store.tables()]
    if any(stored):
        raise ValueError(
            f"layer {store.layer_idx} has stored {max(stored)} tokens; its codecs can be chosen only "
            "before, and a stored token is never packed again"
        )
    store.config = dataclasses.replace(store.config, **options)
    if store.pending is not None:
        known = store.kv_format()
        assert known is not None
        store.begin(known)
    for table in store.tables():
        device = table.plain.device
        table.pools.encoders.set_bases(
            *(None if basis is None else basis.to(device) for basis in (key_basis, value_basis))
        )


def remember_queries(store: LayerStore, query: torch.Tensor, scale: float) -> None:
    """Remember the newest queries `(B, Hq, Q, D)`, by which the errors of pages that are packed next are judged.

    Behind their channels for keys may be others, of latents' rotary parts.
    """
    for part in store.parts:
        if part.table is not None and part.table.pools.encoders.packs:
            _remember_queries(store, query, scale)
            return


@layer_operation
def _remember_queries(store: LayerStore, query: torch.Tensor, scale: float) -> None:
    if store.lanes > 1:
        # A page of a lane is of any head: no queries are those of all pages.
        return
    batch, _, new, _ = query.shape
    for table in store.tables():
        dim = table.plain.keys.shape[-1]
        encoders = table.pools.encoders
        in_page = new == 1 and encoders.queries is not None and store.state.seen % store.config.page_size
        if not encoders.packs or in_page:
            # Pages fill now and then: looking at every decoded token would only cost time.
            continue
        recent = query[:, :, -ERROR_QUERY_POSITIONS:, :dim].reshape(batch, store.heads, -1, dim).transpose(0, 1)
        few = recent.reshape(store.heads, -1, dim)[:, :MAX_ERROR_QUERIES].clone()
        encoders.remember_queries(few.to(table.plain.device), scale)
