"""Attention of a decoding step over the pages that a page router chose."""

import numpy as np
import torch

from ..kernels import merge_pair
from ..kernels.dispatch import choose
from ..kernels.page_lists import ListedPool, PageLists
from ..page_table.full_page_index import FullPageIndex
from ..page_table.listed_pages import listed_pool
from ..pages.page_pool import PagePool
from ..pages.pool_id import PoolId
from ..routing.policy import Choice
from .attention_call import AttentionCall, Partial
from .page_lookup import attend_located, reader_of
from .pool_readers import LocatedPages, PoolReader, lane_pages

# Pages that are chosen have got all their tokens.
_NO_PAGES = np.zeros(0, dtype=np.int64)


def attend_choice(index: FullPageIndex, choice: Choice, folded: torch.Tensor, call: AttentionCall) -> Partial | None:
    """Attend to chosen pages.

    Parameters
    ----------
    index : FullPageIndex
        What was chosen among.
    choice : Choice
        For each KV head of each row.
    folded : torch.Tensor
        `(H, B, G, D)` queries.
    call : AttentionCall
        What holds for all pages.

    Returns
    -------
    tuple of torch.Tensor or None
        `(H, B, G, Dv)` and its LSE `(H, B, G)`, float32; None if nothing was chosen from.
    """
    result: Partial | None = None
    for pool_id, pool in index.pools.items():
        columns, taken = _of_pool(index, choice, pool_id)
        if columns.shape[2]:
            partial = _attend_part(index, pool, columns, taken, folded, call)
            result = partial if result is None else merge_pair(*result, *partial)
    return result


def _of_pool(index: FullPageIndex, choice: Choice, pool_id: PoolId) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the chosen columns of one pool, `(H, B, k')`, and which of them count."""
    if len(index.pools) == 1:
        return choice.columns, choice.taken
    part = index.columns[pool_id]
    mine = (choice.columns >= part.start) & (choice.columns < part.stop)
    if choice.taken is not None:
        mine &= choice.taken
    most = int(mine.sum(dim=2).max()) if mine.numel() else 0
    # Those of the pool first, in their order.
    order = torch.argsort(~mine, dim=2, stable=True)[..., :most]
    mine = mine.gather(2, order)
    return choice.columns.gather(2, order).where(mine, part.start), mine


def _attend_part(
    index: FullPageIndex,
    pool: PagePool,
    columns: torch.Tensor,
    taken: torch.Tensor | None,
    folded: torch.Tensor,
    call: AttentionCall,
) -> Partial:
    """Attend to the columns `(H, B, k)` of the index in one pool, of which `taken` says which count."""
    heads, batch, groups, _ = folded.shape
    reader = reader_of(pool)
    pages = _at_columns(index.pages, columns)
    if taken is not None:
        # What does not count is not fetched from a slower tier either.
        pages = pages.where(taken, pages[..., :1])
    query = reader.query(folded, call.absorbed).reshape(heads * batch, groups, -1)
    page_lse = call.new_page_lse(heads * batch, groups, pages.shape[2], query)
    how, listed = listed_pool(pool, _NO_PAGES)
    if how == "numba" and listed is not None and not call.absorbed:
        out, lse = _attend_chosen(listed, query.view(heads, batch, groups, -1), pages, taken, call, page_lse)
    elif choose(folded.device) != "torch":
        out, lse = _attend_looked_up(reader, query, pages, taken, call, page_lse)
    else:
        bias = None if index.full and taken is None else _hidden(index, pool, columns, taken)
        out, lse = reader.attend_lanes(query, pages, call.piece(bias, None, page_lse))
    if page_lse is not None:
        call.note_page_lse(pool, None, pages, page_lse.view(heads, batch, groups, -1))
    out = out.reshape(heads, batch, groups, -1)
    return reader.output(out, call.absorbed), lse.reshape(heads, batch, groups)


def _attend_chosen(
    pool: ListedPool,
    query: torch.Tensor,
    pages: torch.Tensor,
    taken: torch.Tensor | None,
    call: AttentionCall,
    page_lse: torch.Tensor | None,
) -> Partial:
    """Attend on a CPU with queries `(H, B, G, D')` to pages `(H, B, k)` in place: `(H, B, G, D')` and its LSE."""
    heads, batch, columns = pages.shape
    entries = pages if taken is None else pages.where(taken, -1)
    starts = np.arange(heads * batch + 1, dtype=np.int64) * columns
    lists = PageLists([pool], entries.flatten().numpy(), starts, batch, "numba")
    by_row = None if page_lse is None else page_lse.new_full((batch, heads, *page_lse.shape[1:]), -torch.inf)
    out, lse = lists.attend(query.transpose(0, 1), call.scale, call.softcap, by_row)
    if page_lse is not None and by_row is not None:
        page_lse.copy_(by_row.transpose(0, 1).flatten(0, 1))
    return out.transpose(0, 1), lse.transpose(0, 1)


def _attend_looked_up(
    reader: PoolReader,
    query: torch.Tensor,
    pages: torch.Tensor,
    taken: torch.Tensor | None,
    call: AttentionCall,
    page_lse: torch.Tensor | None,
) -> Partial:
    """Attend in one launch: every KV head of every row is a row of a pool with one head."""
    located = reader.located(pages)
    table = lane_pages(located.numbers, located.keys.pages)
    if taken is None:
        lengths = torch.full((len(table),), table.shape[1], dtype=torch.int32, device=table.device)
    else:
        # What counts comes first.
        lengths = taken.sum(dim=2, dtype=torch.int32).flatten()
    keys, values = (
        codes.map(lambda part: part.reshape(1, -1, *part.shape[2:])) for codes in (located.keys, located.values)
    )
    one_head = LocatedPages(keys, values, table, located.counts.repeat(located.keys.heads))
    return attend_located(query, one_head, lengths, call, page_lse)


def _hidden(index: FullPageIndex, pool: PagePool, columns: torch.Tensor, taken: torch.Tensor | None) -> torch.Tensor:
    """Return the bias `(H * B, 1, k * P)` of slots without a token."""
    counts = _at_columns(index.counts, columns)
    if taken is not None:
        counts = counts.where(taken, 0)
    empty = torch.arange(pool.page_size, device=counts.device) >= counts[..., None]
    return (
        torch.zeros(empty.shape, device=counts.device).masked_fill_(empty, -torch.inf).flatten(2).flatten(0, 1)[:, None]
    )


def _at_columns(figures: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return figures `(B, n)` of the columns `(H, B, k)`."""
    return figures.expand(len(columns), -1, -1).gather(2, columns)
