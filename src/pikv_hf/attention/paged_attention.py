"""Attention over the pages of a table: those beside each other in place, the rest gathered or looked up."""

import numpy as np
import torch

from ..integration.mask_function import PageBias, by_lane
from ..kernels import merge_pair
from ..kernels.dispatch import choose
from ..kernels.partial_attention import MAX_LOGITS
from ..page_table.page_table import UNFILLED, WINDOW, PageTable
from ..page_table.read_plan import ReadPlan, Run
from ..pages.page_pool import PagePool
from ..routing.policies import PageRouter
from .attention_mass import AttentionMass
from .pool_readers import PackedReader, Partial, PlainReader
from .routed_attention import attend_choice
from .tiered_reader import look_up, reader_of

# Scattered pages are gathered at most this many bytes of K/V at a time.
MAX_GATHER_BYTES = 64 * 1024 * 1024


def attend_pages(
    table: PageTable,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    router: PageRouter | None = None,
    seen: int = 0,
    masses: AttentionMass | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the pages of a table; every stored token is older than every query or its own.

    Parameters
    ----------
    table : PageTable
        B rows.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask : torch.Tensor, optional
        `(B, 1 or Hq, Q, T)`; None if no stored token is hidden.
    scale, softcap
        As in :func:`pikv_attention_forward`.
    router : PageRouter, optional
        Chooses the full pages that are read, where Q is 1 and there is no mask.
    seen : int
        Positions up to and including that of the query, for the router.
    masses : AttentionMass, optional
        Told how much of the attention each page takes.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and `(B, Hq, Q)`, float32; 0 and -inf for rows that hold nothing.
    """
    batch, query_heads, queries, dim = query.shape
    heads = table.pool.keys.shape[0]
    if (lanes := len(table.rows) // batch) > 1:
        # Heads keep different tokens: each is a row of its own.
        rows = query.reshape(batch * lanes, query_heads // lanes, queries, dim)
        hidden = None if mask is None else by_lane(mask, batch, lanes)
        out, lse = attend_pages(table, rows, hidden, scale, softcap, router, seen, masses)
        return out.view(batch, query_heads, queries, -1), lse.view(batch, query_heads, queries)
    groups = query_heads // heads
    bias = None if mask is None else PageBias(mask, batch, heads, groups)
    # (H, B, G * Q, D): queries of one KV head together, and a run shared by several rows takes all their queries.
    folded = query.reshape(batch, heads, groups * queries, dim).transpose(0, 1)
    # A kernel that looks pages up needs no plan; it takes one query per row and no mask.
    looks_up = queries == 1 and bias is None and choose(query.device) != "torch"
    pools: dict[str, PagePool] = table.pages.pools()
    result: Partial | None = None
    if router is not None:
        choice = router.choose(table.index(), query[:, :, 0], scale, seen)
        router.counts.add(table.index(), choice, table.always_read, heads)
        if choice is not None:
            pools = {UNFILLED: table.pool}
            result = attend_choice(table.index(), choice, folded, scale, softcap, masses)
    for name, pool in pools.items():
        reader = reader_of(pool)
        if looks_up:
            part = _attend_entries(table, name, reader, folded, scale, softcap, masses)
        else:
            part = _attend_pool(table, name, reader, folded, bias, scale, softcap, masses)
        if part is not None:
            result = part if result is None else merge_pair(*result, *part)
    if masses is not None and not table.writer.reads_window:
        # Another part reads the window; what its tokens are worth when they get here is to be known all the same.
        window = reader_of(table.pool)
        if looks_up:
            _attend_entries(table, WINDOW, window, folded, scale, softcap, masses)
        else:
            _attend_pool(table, WINDOW, window, folded, bias, scale, softcap, masses)
    value_dim = table.pool.values.shape[-1]
    out, lse = _nothing(folded, value_dim) if result is None else result
    return (
        out.transpose(0, 1).reshape(batch, query_heads, queries, value_dim),
        lse.transpose(0, 1).reshape(batch, query_heads, queries),
    )


def _attend_pool(
    table: PageTable,
    name: str,
    reader: "PlainReader | PackedReader",
    folded: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None,
) -> Partial | None:
    """Attend to the pages of one pool: `(H, B, G * Q, Dv)` and its LSE, None if there are none."""
    plan, pool, batch = table.plan(name), reader.pool, folded.shape[1]
    query = reader.query(folded)
    result: Partial | None = None
    # A mask is turned into a bias of the size of the logits, which attention bounds only for itself.
    logits_per_page = folded[..., 0].numel() * pool.page_size
    most = max(1, pool.capacity if bias is None else MAX_LOGITS // logits_per_page)
    for run in plan.runs:
        for piece in run.pieces(most, pool.count, pool.page_size):
            part = _attend_run(reader, piece, query, bias, scale, softcap, masses)
            result = _add_rows(result, part, piece.rows, batch)
    for first in range(0, plan.scattered.shape[1], step := min(most, _gather_step(pool, batch))):
        part = _attend_scattered(reader, plan, slice(first, first + step), query, bias, scale, softcap, masses)
        result = part if result is None else merge_pair(*result, *part)
    return None if result is None else (reader.output(result[0]), result[1])


def _attend_entries(
    table: PageTable,
    name: str,
    reader: "PlainReader | PackedReader",
    folded: torch.Tensor,
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None,
) -> Partial | None:
    """Attend to the pages of one pool in one launch: `(H, B, G, Dv)` and its LSE, None if there are none."""
    entries, lengths = table.entries(name)
    if not entries.shape[1]:
        return None
    heads, batch, groups, _ = folded.shape
    query = reader.query(folded).transpose(0, 1).reshape(batch, heads * groups, -1)
    page_lse = None if masses is None else masses.expect(batch, heads * groups, entries.shape[1], query)
    out, lse = look_up(reader, query, entries, lengths, scale, softcap, page_lse)
    if masses is not None and page_lse is not None:
        by_head = page_lse.view(batch, heads, groups, -1).transpose(0, 1)
        masses.add(reader.pool, None, entries.long()[None], by_head)
    out = out.view(batch, heads, groups, -1).transpose(0, 1)
    return reader.output(out), lse.view(batch, heads, groups).transpose(0, 1)


def _attend_run(
    reader: "PlainReader | PackedReader",
    run: Run,
    query: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None,
) -> Partial:
    """Attend to neighbouring pages in place, for all rows that share them: `(H, rows, G * Q, Dv)` and its LSE."""
    pool, heads, rows = reader.pool, query.shape[0], len(run.rows)
    mine = query if rows == query.shape[1] else query[:, run.rows]
    hidden = None if bias is None else bias.shared(run.rows, pool.positions[run.start : run.stop].view(-1))
    lanes = mine.reshape(heads, -1, query.shape[-1])
    page_lse = None if masses is None else masses.expect(heads, lanes.shape[1], run.stop - run.start, query)
    out, lse = reader.attend_run(lanes, run.start, run.stop, scale, hidden, _holes(pool, run), softcap, page_lse)
    if masses is not None and page_lse is not None:
        pages = torch.arange(run.start, run.stop, device=query.device)
        masses.add(pool, run.rows, pages, page_lse.view(heads, rows, -1, len(pages)))
    return out.view(heads, rows, -1, out.shape[-1]), lse.view(heads, rows, -1)


def _holes(pool: PagePool, run: Run) -> torch.Tensor | None:
    """Return the empty slots of a run, counted from its first slot. Pages fill but never empty while a plan lasts."""
    if not len(run.partial):
        return None
    return pool.index(run.slots[np.arange(pool.page_size) >= pool.count[run.partial, None]])


def _attend_scattered(
    reader: "PlainReader | PackedReader",
    plan: ReadPlan,
    part: slice,
    query: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: AttentionMass | None,
) -> Partial:
    """Attend to each row's scattered pages, gathered: `(H, B, G * Q, Dv)` and its LSE."""
    pool = reader.pool
    heads, batch, queries, _ = query.shape
    ids = plan.scattered[:, part]
    tokens = ids.shape[1] * pool.page_size
    held = np.where(np.arange(part.start, part.start + ids.shape[1]) < plan.lengths[:, None], pool.count[ids], 0)
    empty = (np.arange(pool.page_size) >= held[:, :, None]).reshape(batch, tokens)
    index = pool.index(ids)
    hidden = None if bias is None else bias.per_row(pool.positions[index].view(batch, tokens))
    holes = None
    if batch == 1:
        holes = pool.index(np.flatnonzero(empty))
    else:
        # Rows have their holes at different places, which only a bias can say.
        gone = torch.from_numpy(np.where(empty, -np.inf, 0.0).astype(np.float32)).to(query.device)
        by_lane = gone.repeat(heads, 1).unsqueeze(1)
        hidden = by_lane if hidden is None else hidden + by_lane
    lanes = query.reshape(heads * batch, queries, -1)
    page_lse = None if masses is None else masses.expect(heads * batch, queries, ids.shape[1], query)
    out, lse = reader.attend_gathered(lanes, index, scale, hidden, holes, softcap, page_lse)
    if masses is not None and page_lse is not None:
        masses.add(pool, None, index[None], page_lse.view(heads, batch, queries, -1))
    return out.view(heads, batch, queries, -1), lse.view(heads, batch, queries)


def _gather_step(pool: PagePool, batch: int) -> int:
    return max(1, MAX_GATHER_BYTES // (batch * pool.page_bytes))


def _nothing(folded: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = folded.shape[:3]
    out = torch.zeros((*shape, value_dim), dtype=torch.float32, device=folded.device)
    return out, out.new_full(shape, -torch.inf)


def _add_rows(
    result: Partial | None,
    part: Partial,
    rows: list[int],
    batch: int,
) -> Partial:
    """Merge a part that some rows read into the result of all, `(H, B, M, Dv)` and `(H, B, M)`."""
    if len(rows) == batch:
        return part if result is None else merge_pair(*result, *part)
    out, lse = result if result is not None else _empty_like(part, batch)
    merged_out, merged_lse = merge_pair(out[:, rows], lse[:, rows], *part)
    out[:, rows], lse[:, rows] = merged_out, merged_lse
    return out, lse


def _empty_like(part: Partial, batch: int) -> Partial:
    heads, _, queries, dim = part[0].shape
    return part[0].new_zeros((heads, batch, queries, dim)), part[1].new_full((heads, batch, queries), -torch.inf)
