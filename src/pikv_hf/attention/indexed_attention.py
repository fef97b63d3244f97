"""Attention to single tokens of full pages: those that a model's own indexer has chosen."""

import torch

from ..kernels import merge_pair, partial_attention
from ..kernels.gather_tokens import gather_tokens
from ..kernels.page_codes import PageCodes
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
        `(B, 1 or H, k)` int64, distinct for each row and head; what is negative does not count.
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
    places = index.places().unsqueeze(1).expand(-1, columns.shape[1], -1)
    known = (columns >= 0) & (columns < places.shape[2])
    at = places.gather(2, columns.where(known, 0)).masked_fill(~known, -1)
    # Heads first, as queries are.
    at = at.expand(-1, len(folded), -1).transpose(0, 1)
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
    """Attend to places `(H, B, k)` of one pool, see :meth:`FullPageIndex.places`, of which `mine` says which count."""
    heads, batch, groups, _ = folded.shape
    reader = reader_of(pool)
    pages = index.pages.expand(heads, -1, -1).gather(2, places // pool.page_size)
    # What does not count is read of a page that does: no other is fetched from a slower tier for it.
    pages = pages.where(mine, pages.gather(2, mine.int().argmax(dim=2, keepdim=True)))
    located = reader.located(pages)
    query = reader.query(folded, call.absorbed).reshape(heads * batch, groups, -1)
    slots = places % pool.page_size
    keys, values = (_tokens(codes, located.numbers, slots, query.dtype) for codes in (located.keys, located.values))
    bias = torch.zeros(mine.shape, device=mine.device).masked_fill_(~mine, -torch.inf)
    out, lse = partial_attention(
        query, keys, values, call.scale, bias.flatten(0, 1).unsqueeze(1), None, call.softcap, None, call.absorbed
    )
    out = out.view(heads, batch, groups, -1)
    return reader.output(out, call.absorbed), lse.view(heads, batch, groups)


def _tokens(codes: PageCodes, numbers: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tokens at pages and slots `(H, B, k)`, each head its own: `(H * B, k, D')`."""
    heads, _, count = numbers.shape
    # The pages of all heads as those of one.
    one_head = codes.map(lambda part: part.reshape(1, -1, *part.shape[2:]))
    first = torch.arange(heads, device=numbers.device)[:, None, None] * codes.pages
    tokens = gather_tokens(one_head, (numbers.long() + first).flatten(), slots.flatten(), dtype)
    return tokens.view(-1, count, tokens.shape[-1])
