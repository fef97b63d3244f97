"""Attention to single tokens of full pages: those that a model's own indexer has chosen."""

import torch

from ..kernels import merge_pair, partial_attention
from ..kernels.gather_tokens import gather_tokens
from ..page_table.full_page_index import FullPageIndex
from ..pages.page_pool import PagePool
from .attention_call import AttentionCall, Partial
from .page_lookup import reader_of


def attend_columns(
    index: FullPageIndex, columns: torch.Tensor, folded: torch.Tensor, call: AttentionCall
) -> Partial | None:
    """Attend to the tokens at some columns, as far as they are in full pages.

    Parameters
    ----------
    index : FullPageIndex
        Of these pages.
    columns : torch.Tensor
        `(B, k)` int64, distinct in each row; what is negative does not count.
    folded : torch.Tensor
        `(H, B, G, D)` queries.
    call : AttentionCall
        What holds for all pages.

    Returns
    -------
    tuple of torch.Tensor or None
        `(H, B, G, Dv)` and its LSE `(H, B, G)`, float32; None if there are no full pages.
    """
    result: Partial | None = None
    if not index.width:
        return result
    places = index.places()
    known = (columns >= 0) & (columns < places.shape[1])
    at = places.gather(1, columns.where(known, 0)).masked_fill(~known, -1)
    for pool_id, pool in index.pools.items():
        span = index.columns[pool_id]
        mine = (at >= span.start * pool.page_size) & (at < span.stop * pool.page_size)
        partial = _attend_places(index, pool, at.where(mine, span.start * pool.page_size), mine, folded, call)
        result = partial if result is None else merge_pair(*result, *partial)
    return result


def _attend_places(
    index: FullPageIndex,
    pool: PagePool,
    places: torch.Tensor,
    mine: torch.Tensor,
    folded: torch.Tensor,
    call: AttentionCall,
) -> Partial:
    """Attend to places `(B, k)` of one pool, see :meth:`FullPageIndex.places`, of which `mine` says which count."""
    heads, batch, groups, _ = folded.shape
    reader = reader_of(pool)
    pages = index.pages.gather(1, places // pool.page_size)
    # What does not count is read of a page that does: no other is fetched from a slower tier for it.
    pages = pages.where(mine, pages.gather(1, mine.int().argmax(dim=1, keepdim=True)))
    located = reader.located(pages)
    at = located.numbers.flatten().long(), (places % pool.page_size).flatten()
    query = reader.query(folded, call.absorbed).reshape(heads * batch, groups, -1)
    tokens = (gather_tokens(codes, *at, query.dtype) for codes in (located.keys, located.values))
    keys, values = (part.view(heads * batch, places.shape[1], -1) for part in tokens)
    bias = torch.zeros(mine.shape, device=mine.device).masked_fill_(~mine, -torch.inf)
    out, lse = partial_attention(
        query, keys, values, call.scale, bias.repeat(heads, 1).unsqueeze(1), None, call.softcap, None, call.absorbed
    )
    out = out.view(heads, batch, groups, -1)
    return reader.output(out, call.absorbed), lse.view(heads, batch, groups)
