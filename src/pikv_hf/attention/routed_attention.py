"""Attention of a decoding step over the pages that routing chose."""

import torch

from ..kernels import merge_pair
from ..kernels.dispatch import choose
from ..kernels.paged_decode_attention import paged_decode_attention
from ..page_table.full_page_index import FullPageIndex
from ..pages.page_pool import PagePool
from ..routing.policies import Choice
from .attention_mass import AttentionMass
from .pool_readers import PackedReader, Partial, PlainReader, lane_pages
from .tiered_reader import reader_of


def attend_choice(
    index: FullPageIndex,
    choice: Choice,
    folded: torch.Tensor,
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None = None,
) -> Partial | None:
    """Attend to chosen pages.

    Parameters
    ----------
    index : FullPageIndex
        What was chosen among.
    choice : Choice
        For each KV head of each row.
    folded : torch.Tensor
        `(H, B, G, D)` queries.
    scale, softcap
        As in :func:`pikv_hf.kernels.partial_attention`.
    masses : AttentionMass, optional
        Told how much of the attention each page takes.

    Returns
    -------
    tuple of torch.Tensor or None
        `(H, B, G, Dv)` and its LSE `(H, B, G)`, float32; None if nothing was chosen from.
    """
    result: Partial | None = None
    for name, pool in index.pools.items():
        columns, taken = _of_pool(index, choice, name)
        if columns.shape[2]:
            part = _attend_part(index, pool, columns, taken, folded, scale, softcap, masses)
            result = part if result is None else merge_pair(*result, *part)
    return result


def _of_pool(index: FullPageIndex, choice: Choice, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the chosen columns of one pool, `(H, B, k')`, and which of them count."""
    if len(index.pools) == 1:
        return choice.columns, choice.taken
    part = index.columns[name]
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
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None,
) -> Partial:
    heads, batch, groups, _ = folded.shape
    reader = reader_of(pool)
    pages = _rows(index.pages, columns)
    if taken is not None:
        # What does not count is not fetched from a slower tier either.
        pages = pages.where(taken, pages[..., :1])
    query = reader.query(folded).reshape(heads * batch, groups, -1)
    page_lse = None if masses is None else masses.expect(heads * batch, groups, pages.shape[2], query)
    if choose(folded.device) != "torch":
        out, lse = _attend_looked_up(reader, query, pages, taken, scale, softcap, page_lse)
    else:
        bias = None if index.full and taken is None else _hidden(index, pool, columns, taken)
        out, lse = reader.attend_lanes(query, pages, scale, bias, softcap, page_lse)
    if masses is not None and page_lse is not None:
        masses.add(pool, None, pages, page_lse.view(heads, batch, groups, -1))
    return reader.output(out.view(heads, batch, groups, -1)), lse.view(heads, batch, groups)


def _attend_looked_up(
    reader: PlainReader | PackedReader,
    query: torch.Tensor,
    pages: torch.Tensor,
    taken: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    page_lse: torch.Tensor | None,
) -> Partial:
    """Attend in one launch: every KV head of every row is a row of a pool with one head."""
    keys, values, places, counts = reader.located(pages)
    table = lane_pages(places, keys.pages)
    if taken is None:
        lengths = torch.full((len(table),), table.shape[1], dtype=torch.int32, device=table.device)
    else:
        # What counts comes first.
        lengths = taken.sum(dim=2, dtype=torch.int32).flatten()
    counts = counts.repeat(keys.heads)
    keys, values = (codes.map(lambda part: part.reshape(1, -1, *part.shape[2:])) for codes in (keys, values))
    arguments = query, keys, values, table.int(), lengths, counts, scale, softcap
    if page_lse is None:
        out, lse = paged_decode_attention(*arguments)
    else:
        out, lse, of_pages = paged_decode_attention(*arguments, page_lse=True)
        page_lse.copy_(of_pages)
    return out, lse


def _hidden(index: FullPageIndex, pool: PagePool, columns: torch.Tensor, taken: torch.Tensor | None) -> torch.Tensor:
    """Return the bias `(H * B, 1, k * P)` of slots without a token."""
    counts = _rows(index.counts, columns)
    if taken is not None:
        counts = counts.where(taken, 0)
    empty = torch.arange(pool.page_size, device=counts.device) >= counts[..., None]
    return (
        torch.zeros(empty.shape, device=counts.device).masked_fill_(empty, -torch.inf).flatten(2).flatten(0, 1)[:, None]
    )


def _rows(facts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return facts `(B, n)` of the columns `(H, B, k)`."""
    return facts.expand(len(columns), -1, -1).gather(2, columns)
