"""The attention function registered with transformers: partial attention over pages, merged by log-sum-exp."""

from typing import Any

import numpy as np
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import causal_attention, merge_pair
from .kernels.dispatch import choose
from .kernels.merge_partials import merge_sinks
from .kernels.partial_attention import MAX_LOGITS
from .layer import LAYER_ATTRIBUTE, PiKVLayer
from .marks import forget_reader, without_marked
from .masks import PLAIN_ATTRIBUTE, PageBias, by_lane, new_tokens_valid, trailing_columns
from .page_book import PageBook
from .page_masses import PageMasses, own_masses
from .read_plan import ReadPlan, Run
from .readers import Partial, PlainReader, SealedReader
from .routed import attend_choice
from .routing import Router
from .table import UNFILLED, PageTable
from .tiered_reader import look_up, reader_of

# Scattered pages are gathered at most this many bytes of K/V at a time.
MAX_GATHER_BYTES = 64 * 1024 * 1024

# Where a press puts what it wants called with the queries of each call:
# `(query, tokens before it, which of its tokens are real, scale, sinks, softcap)`.
OBSERVER_ATTRIBUTE = "_pikv_observer"


def pikv_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a :class:`PiKVLayer`'s pages and the new tokens; with any other cache, or none, as SDPA does.

    Parameters
    ----------
    module : torch.nn.Module
        The attention module.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    key, value : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)` new tokens with a reference to their layer, or all tokens without one.
    attention_mask : torch.Tensor, optional
        `(B, 1 or Hq, Q, T)` over logical positions, boolean or additive; None is causal.
    scaling : float, optional
        Factor on the logits, by default `D ** -0.5`.
    **kwargs
        `s_aux` (attention sinks, `(Hq,)`) and `softcap` are handled; the rest concerns other implementations.

    Returns
    -------
    tuple
        `(B, Q, Hq, Dv)` and None: the attention weights are never formed.
    """
    layer = getattr(key, LAYER_ATTRIBUTE, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    if (observer := getattr(module, OBSERVER_ATTRIBUTE, None)) is not None:
        tokens = layer.seen if isinstance(layer, PiKVLayer) else key.shape[2]
        valid = new_tokens_valid(attention_mask, query.shape[2])
        observer(query, tokens - query.shape[2], valid, scale, sinks, softcap)
    if not isinstance(layer, PiKVLayer):
        if key.shape[2] == query.shape[2]:
            forget_reader(module)
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            attention_mask = _trailing_causal_mask(query, key)
        if sinks is None and softcap is None:
            # As registered: kvpress has wrapped it, to hide what its head-wise presses have marked.
            sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs)
        visible = without_marked(module, query, key, attention_mask)
        return _to_output(*_attend_new(query, key, value, visible, scale, softcap), sinks, query.dtype), None

    if layer.attachment is not None and not layer.attachment.owns(module):
        layer.rollback(query.shape[2])
        raise ValueError(
            f"layer {layer.layer_idx}: the cache was made for another model than the one that {type(module).__name__} "
            "belongs to; make one with PiKVCache.for_model(model)"
        )
    if attention_mask is not None and attention_mask.shape[-1] != (seen := layer.positions_seen):
        layer.rollback(query.shape[2])
        raise ValueError(
            f"layer {layer.layer_idx}: the attention mask spans {attention_mask.shape[-1]} positions, the cache {seen}"
        )
    if attention_mask is not None and layer.dropped:
        attention_mask = trailing_columns(attention_mask, layer.seen)
    layer.attend_begins(new_tokens_valid(attention_mask, query.shape[2]))
    layer.observe(query, scale)
    if layer.pending is not None and layer.pending.keys.shape[2] == layer.seen and sinks is None and softcap is None:
        # The prompt: nothing is stored yet, so ordinary attention over the fresh K/V is all there is.
        output = sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scale)
        if layer.schedule is not None and layer.table is not None:
            layer.schedule.begin_step(layer.table)
            _watch_new(layer, query, attention_mask, scale, softcap, None)
        layer.attend_ends()
        return output
    out, lse = attend(layer, query, attention_mask, scale, softcap, sinks)
    layer.attend_ends()
    return _to_output(out, lse, sinks, query.dtype), None


def attend(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over everything that a layer holds, pending tokens included.

    Parameters
    ----------
    layer : PiKVLayer
        Its newest Q tokens are the queries' own.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask, scale, softcap
        As in :func:`pikv_attention_forward`.
    sinks : torch.Tensor, optional
        `(Hq,)` attention sinks. The result leaves them out; they lessen the shares of the attention that pages take.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and its LSE `(B, Hq, Q)`, float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert layer.table is not None
    history_mask = None if layer.vetted and (mask is None or hasattr(mask, PLAIN_ATTRIBUTE)) else mask
    # A call with several new tokens has many queries, which together look everywhere.
    router = layer.router if query.shape[2] == 1 and history_mask is None and layer.pending is None else None
    masses = None if layer.schedule is None else PageMasses()
    out, lse = attend_pages(layer.table, query, history_mask, scale, softcap, router, layer.seen, masses)
    if layer.pending is not None:
        new = _attend_new(query, layer.pending.keys, layer.pending.values, mask, scale, softcap)
        out, lse = merge_pair(out, lse, *new)
    if layer.schedule is not None and masses is not None:
        layer.schedule.begin_step(layer.table)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
        masses.note(_by_kv_head(total, layer.table))
        _watch_new(layer, query, mask, scale, softcap, total)
    return out, lse


def _by_kv_head(lse: torch.Tensor, table: PageTable) -> torch.Tensor:
    """Return `(B, Hq, Q)` as `(H, rows, G * Q)`, rows being lanes where heads keep different tokens."""
    return lse.reshape(len(table.rows), table.pool.keys.shape[0], -1).transpose(0, 1)


def _watch_new(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """Tell the layer's schedule of the queries, and how the call's own tokens are attended to until they are stored."""
    if layer.schedule is None:
        return
    layer.schedule.observe(query, scale)
    if (new := layer.pending) is not None:
        batch, heads = new.keys.shape[:2]
        bias = None
        if mask is not None:
            bias = PageBias(mask, batch, heads, query.shape[1] // heads).new_tokens(new.tokens)
        new.masses = own_masses(query, new.keys, bias, scale, softcap, lse)


def attend_pages(
    table: PageTable,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    router: Router | None = None,
    seen: int = 0,
    masses: PageMasses | None = None,
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
    router : Router, optional
        Chooses the full pages that are read, where Q is 1 and there is no mask.
    seen : int
        Positions up to and including that of the query, for the router.
    masses : PageMasses, optional
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
    pools: dict[str, PageBook] = table.pages.pools()
    result: Partial | None = None
    if router is not None:
        choice = router.choose(table.index(), query[:, :, 0], scale, seen)
        router.counts.add(table.index(), choice, sum(len(row.unfilled()) for row in table.rows), heads)
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
    value_dim = table.pool.values.shape[-1]
    out, lse = _nothing(folded, value_dim) if result is None else result
    return (
        out.transpose(0, 1).reshape(batch, query_heads, queries, value_dim),
        lse.transpose(0, 1).reshape(batch, query_heads, queries),
    )


def _attend_pool(
    table: PageTable,
    name: str,
    reader: "PlainReader | SealedReader",
    folded: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: PageMasses | None,
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
    reader: "PlainReader | SealedReader",
    folded: torch.Tensor,
    scale: float,
    softcap: float | None,
    masses: PageMasses | None,
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
    reader: "PlainReader | SealedReader",
    run: Run,
    query: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: PageMasses | None,
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


def _holes(pool: PageBook, run: Run) -> torch.Tensor | None:
    """Return the empty slots of a run, counted from its first slot. Pages fill but never empty while a plan lasts."""
    if not len(run.partial):
        return None
    return pool.index(run.slots[np.arange(pool.page_size) >= pool.count[run.partial, None]])


def _attend_scattered(
    reader: "PlainReader | SealedReader",
    plan: ReadPlan,
    part: slice,
    query: torch.Tensor,
    bias: PageBias | None,
    scale: float,
    softcap: float | None,
    masses: PageMasses | None,
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


def _gather_step(pool: PageBook, batch: int) -> int:
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


def _attend_new(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend among dense tokens, causally unless a mask says otherwise: `(B, Hq, Q, Dv)` and its LSE."""
    batch, query_heads, queries, dim = query.shape
    heads, tokens = keys.shape[1:3]
    groups = query_heads // heads
    bias = None if mask is None else PageBias(mask, batch, heads, groups).new_tokens(tokens)
    grouped = query.reshape(batch, heads, groups, queries, dim)
    out, lse = causal_attention(grouped, keys, values, scale, bias, softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _to_output(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if sinks is not None:
        out = merge_sinks(out, lse, sinks)
    return out.to(dtype).transpose(1, 2).contiguous()


def _trailing_causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the causal mask of queries that are the last of the keys; SDPA's own flag aligns them with the first."""
    queries, tokens = query.shape[2], key.shape[2]
    return torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=query.device).tril_(tokens - queries)
