"""Attention over the pages of a table: those beside each other in place, the rest gathered or looked up."""

import numpy as np
import torch

from ..kernels import merge_pair
from ..kernels.dispatch import choose
from ..kernels.page_lists import PageLists
from ..kernels.partial_attention import MAX_LOGITS
from ..page_table.page_table import PageTable
from ..page_table.read_plan import ReadPlan, Run
from ..page_table.sequence_pages import Region
from ..pages.page_pool import PagePool
from ..pages.pool_id import PoolId
from .attention_call import AttentionCall, Partial
from .indexed_attention import attend_columns
from .mask_bias import MaskBias, mask_by_lane
from .page_lookup import look_up, reader_of
from .pool_readers import PoolReader
from .routed_attention import attend_choice

# Scattered pages are gathered at most this many bytes of K/V at a time.
MAX_GATHER_BYTES = 64 * 1024 * 1024


def attend_pages(table: PageTable, query: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall) -> Partial:
    """Attend over the pages of a table; every stored token is older than every query or its own.

    Parameters
    ----------
    table : PageTable
        B rows, or B times as many lanes as there are KV heads, where heads keep different tokens.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask : torch.Tensor, optional
        `(B, 1 or Hq, Q, T)`, boolean or additive; None if no stored token is hidden.
    call : AttentionCall
        What holds for all pages.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and `(B, Hq, Q)`, float32; 0 and -inf for rows that hold nothing.
    """
    batch, query_heads, queries, dim = query.shape
    is_step = queries == 1 and mask is None and not call.absorbed
    reads_all = call.masses is None and call.page_router is None and call.columns is None
    if is_step and reads_all and (lists := table.view.lists()) is not None:
        # Lanes are rows, and follow each other as the query heads do.
        return lists.attend(query, call.scale, call.softcap)
    if (lanes := len(table.rows) // batch) > 1:
        rows = query.reshape(batch * lanes, query_heads // lanes, queries, dim)
        hidden = None if mask is None else mask_by_lane(mask, batch, lanes)
        out, lse = attend_pages(table, rows, hidden, call)
        return out.view(batch, query_heads, queries, -1), lse.view(batch, query_heads, queries)
    heads = table.plain.keys.shape[0]
    groups = query_heads // heads
    bias = None if mask is None else MaskBias(mask, batch, heads, groups)
    # (H, B, G * Q, D): queries of one KV head together, and a run shared by several rows takes all their queries.
    folded = query.reshape(batch, heads, groups * queries, dim).transpose(0, 1)
    # Kernels that look pages up need no plan; they take one query per row and no mask.
    looks_up = queries == 1 and bias is None
    chosen, whole = _attend_chosen(table, query, folded, call)
    partials = [chosen] if chosen is not None else []
    for region in whole:
        partials += _attend_pool(table, region, folded, bias, looks_up, call)
    if call.masses is not None and not table.writer.reads_window:
        # Another part reads the window; what its tokens are worth when they get here is to be known all the same.
        _attend_pool(table, Region.WINDOW, folded, bias, looks_up, call)
    value_dim = (table.plain.keys if call.absorbed else table.plain.values).shape[-1]
    out, lse = _merged(partials) if partials else _nothing(folded, value_dim)
    return (
        out.transpose(0, 1).reshape(batch, query_heads, queries, value_dim),
        lse.transpose(0, 1).reshape(batch, query_heads, queries),
    )


def _attend_chosen(
    table: PageTable, query: torch.Tensor, folded: torch.Tensor, call: AttentionCall
) -> tuple[Partial | None, list[PoolId | Region]]:
    """Attend to what the call or a page router chooses of full pages; return also what is left to read as a whole."""
    if call.columns is not None:
        return attend_columns(table.view.full_pages(), call.columns, folded, call), [Region.UNFILLED]
    every: list[PoolId | Region] = [*table.pools.by_id()]
    page_router = call.page_router
    if page_router is None:
        return None, every
    choice = page_router.choose(table.view.full_pages(), query[:, :, 0], call.scale, call.seen)
    page_router.counts.add(table.view.full_pages(), choice, table.view.always_read, folded.shape[0])
    if choice is None:
        return None, every
    return attend_choice(table.view.full_pages(), choice, folded, call), [Region.UNFILLED]


def _attend_pool(
    table: PageTable,
    region: PoolId | Region,
    folded: torch.Tensor,
    bias: MaskBias | None,
    looks_up: bool,
    call: AttentionCall,
) -> list[Partial]:
    """Attend to the pages of one pool: `(H, B, G * Q, Dv)` and its LSE, nothing if there are none."""
    reader = reader_of(table.view.pool_of(region))
    query = reader.query(folded, call.absorbed)
    lists = table.view.lists(region) if looks_up and not call.absorbed else None
    if lists is not None:
        partial: Partial | None = _attend_lists(table, region, lists, query, call)
    elif looks_up and choose(query.device) != "torch":
        partial = _attend_entries(reader, query, table.view.entries(region), call)
    else:
        partial = _attend_plan(reader, query, table.view.plan(region), bias, call)
    return [] if partial is None else [(reader.output(partial[0], call.absorbed), partial[1])]


def _attend_lists(
    table: PageTable, region: PoolId | Region, lists: PageLists, query: torch.Tensor, call: AttentionCall
) -> Partial:
    """Attend to the lists of pages of one pool in one call of a compiled kernel: `(H, B, G, D')` and its LSE."""
    by_row = query.transpose(0, 1)
    if call.masses is None:
        out, lse = lists.attend(by_row, call.scale, call.softcap)
    else:
        pages = table.view.entries(region)[0].long()
        heads, batch, groups, _ = query.shape
        page_lse = query.new_full((batch, heads, groups, pages.shape[1]), -torch.inf, dtype=torch.float32)
        out, lse = lists.attend(by_row, call.scale, call.softcap, page_lse)
        call.note_page_lse(table.view.pool_of(region), None, pages[None], page_lse.transpose(0, 1))
    return out.transpose(0, 1), lse.transpose(0, 1)


def _attend_entries(
    reader: PoolReader, query: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], call: AttentionCall
) -> Partial | None:
    """Attend to `(page numbers, lengths)` of each row in one launch: `(H, B, G, D')` and its LSE."""
    entries, lengths = table
    if not entries.shape[1]:
        return None
    heads, batch, groups, _ = query.shape
    by_row = query.transpose(0, 1).reshape(batch, heads * groups, -1)
    page_lse = call.new_page_lse(batch, heads * groups, entries.shape[1], query)
    out, lse = look_up(reader, by_row, entries, lengths, call, page_lse)
    if page_lse is not None:
        by_head = page_lse.view(batch, heads, groups, -1).transpose(0, 1)
        call.note_page_lse(reader.pool, None, entries.long()[None], by_head)
    return out.view(batch, heads, groups, -1).transpose(0, 1), lse.view(batch, heads, groups).transpose(0, 1)


def _attend_plan(
    reader: PoolReader, query: torch.Tensor, plan: ReadPlan, bias: MaskBias | None, call: AttentionCall
) -> Partial | None:
    """Attend to runs of neighbouring pages in place, and to scattered ones gathered."""
    pool, batch = reader.pool, query.shape[1]
    result: Partial | None = None
    # A mask is turned into a bias of the size of the logits, which attention bounds only for itself.
    logits_per_page = query[..., 0].numel() * pool.page_size
    most = max(1, pool.capacity if bias is None else MAX_LOGITS // logits_per_page)
    for run in plan.runs:
        for piece in run.pieces(most, pool.count, pool.page_size):
            partial = _attend_run(reader, piece, query, bias, call)
            result = _add_rows(result, partial, piece.rows, batch)
    for first in range(0, plan.scattered.shape[1], step := min(most, _gather_step(pool, batch))):
        partial = _attend_scattered(reader, plan, slice(first, first + step), query, bias, call)
        result = partial if result is None else merge_pair(*result, *partial)
    return result


def _attend_run(
    reader: PoolReader, run: Run, query: torch.Tensor, bias: MaskBias | None, call: AttentionCall
) -> Partial:
    """Attend to neighbouring pages in place, for all rows that share them: `(H, rows, G * Q, D')` and its LSE."""
    pool, heads, rows = reader.pool, query.shape[0], len(run.rows)
    mine = query if rows == query.shape[1] else query[:, run.rows]
    hidden = None if bias is None else bias.shared(run.rows, pool.positions[run.start : run.stop].view(-1))
    lanes = mine.reshape(heads, -1, query.shape[-1])
    page_lse = call.new_page_lse(heads, lanes.shape[1], run.stop - run.start, query)
    args = call.piece(hidden, _holes(pool, run), page_lse)
    out, lse = reader.attend_run(lanes, run.start, run.stop, args)
    if page_lse is not None:
        pages = torch.arange(run.start, run.stop, device=query.device)
        call.note_page_lse(pool, run.rows, pages, page_lse.view(heads, rows, -1, len(pages)))
    return out.view(heads, rows, -1, out.shape[-1]), lse.view(heads, rows, -1)


def _holes(pool: PagePool, run: Run) -> torch.Tensor | None:
    """Return the empty slots of a run, counted from its first slot. Pages fill but never empty while a plan lasts."""
    if not len(run.partial):
        return None
    return pool.index(run.slots[np.arange(pool.page_size) >= pool.count[run.partial, None]])


def _attend_scattered(
    reader: PoolReader, plan: ReadPlan, columns: slice, query: torch.Tensor, bias: MaskBias | None, call: AttentionCall
) -> Partial:
    """Attend to each row's scattered pages, gathered: `(H, B, G * Q, D')` and its LSE."""
    pool = reader.pool
    heads, batch, queries, _ = query.shape
    ids = plan.scattered[:, columns]
    tokens = ids.shape[1] * pool.page_size
    counted = np.arange(columns.start, columns.start + ids.shape[1]) < plan.lengths[:, None]
    filled = np.where(counted, pool.count[ids], 0)
    empty = (np.arange(pool.page_size) >= filled[:, :, None]).reshape(batch, tokens)
    index = pool.index(ids)
    hidden = None if bias is None else bias.per_row(pool.positions[index].view(batch, tokens))
    holes = None
    if batch == 1:
        holes = pool.index(np.flatnonzero(empty))
    else:
        # Rows have their holes at different places, which only a bias can say.
        gone = torch.from_numpy(np.where(empty, -np.inf, 0.0).astype(np.float32)).to(query.device)
        of_lanes = gone.repeat(heads, 1).unsqueeze(1)
        hidden = of_lanes if hidden is None else hidden + of_lanes
    lanes = query.reshape(heads * batch, queries, -1)
    page_lse = call.new_page_lse(heads * batch, queries, ids.shape[1], query)
    args = call.piece(hidden, holes, page_lse)
    out, lse = reader.attend_gathered(lanes, index, args)
    if page_lse is not None:
        call.note_page_lse(pool, None, index[None], page_lse.view(heads, batch, queries, -1))
    return out.view(heads, batch, queries, -1), lse.view(heads, batch, queries)


def _gather_step(pool: PagePool, batch: int) -> int:
    return max(1, MAX_GATHER_BYTES // (batch * pool.page_bytes))


def _merged(partials: list[Partial]) -> Partial:
    result = partials[0]
    for partial in partials[1:]:
        result = merge_pair(*result, *partial)
    return result


def _nothing(folded: torch.Tensor, value_dim: int) -> Partial:
    shape = folded.shape[:3]
    out = torch.zeros((*shape, value_dim), dtype=torch.float32, device=folded.device)
    return out, out.new_full(shape, -torch.inf)


def _add_rows(result: Partial | None, partial: Partial, rows: list[int], batch: int) -> Partial:
    """Merge what some rows have read into the result of all, `(H, B, M, Dv)` and `(H, B, M)`."""
    if len(rows) == batch:
        return partial if result is None else merge_pair(*result, *partial)
    out, lse = result if result is not None else _empty_like(partial, batch)
    merged_out, merged_lse = merge_pair(out[:, rows], lse[:, rows], *partial)
    out[:, rows], lse[:, rows] = merged_out, merged_lse
    return out, lse


def _empty_like(partial: Partial, batch: int) -> Partial:
    heads, _, queries, dim = partial[0].shape
    return partial[0].new_zeros((heads, batch, queries, dim)), partial[1].new_full((heads, batch, queries), -torch.inf)
