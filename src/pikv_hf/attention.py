"""The attention function registered with transformers: partial attention over pages, merged by log-sum-exp."""

from typing import Any

import numpy as np
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .kernels import causal_attention, merge_partials, partial_attention
from .kernels.merge_partials import merge_sinks
from .kernels.partial_attention import MAX_LOGITS
from .layer import LAYER_ATTRIBUTE, PiKVLayer
from .masks import PLAIN_ATTRIBUTE, PageBias, new_tokens_valid
from .read_plan import Run
from .table import PageTable

# Scattered pages are gathered at most this many bytes of K/V at a time.
MAX_GATHER_BYTES = 64 * 1024 * 1024


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
    if not isinstance(layer, PiKVLayer):
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            attention_mask = _trailing_causal_mask(query, key)
        if sinks is None and softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scale, **kwargs)
        return _to_output(*_attend_new(query, key, value, attention_mask, scale, softcap), sinks, query.dtype), None

    if layer.attachment is not None and not layer.attachment.owns(module):
        layer.rollback(query.shape[2])
        raise ValueError(
            f"layer {layer.layer_idx}: the cache was made for another model than the one that {type(module).__name__} "
            "belongs to; make one with PiKVCache.for_model(model)"
        )
    if attention_mask is not None and attention_mask.shape[-1] != (seen := layer.seen):
        layer.rollback(query.shape[2])
        raise ValueError(
            f"layer {layer.layer_idx}: the attention mask spans {attention_mask.shape[-1]} positions, the cache {seen}"
        )
    layer.attend_begins(new_tokens_valid(attention_mask, query.shape[2]))
    if layer.pending is not None and layer.pending.keys.shape[2] == layer.seen and sinks is None and softcap is None:
        # The prompt: nothing is stored yet, so ordinary attention over the fresh K/V is all there is.
        output = sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scale)
        layer.attend_ends()
        return output
    out, lse = attend(layer, query, attention_mask, scale, softcap)
    layer.attend_ends()
    return _to_output(out, lse, sinks, query.dtype), None


def attend(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
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

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and its LSE `(B, Hq, Q)`, float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert layer.table is not None
    history_mask = None if layer.vetted and (mask is None or hasattr(mask, PLAIN_ATTRIBUTE)) else mask
    out, lse = attend_pages(layer.table, query, history_mask, scale, softcap)
    if layer.pending is not None:
        new = _attend_new(query, layer.pending.keys, layer.pending.values, mask, scale, softcap)
        out, lse = merge_partials(out, lse, *new)
    return out, lse


def attend_pages(
    table: PageTable, query: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
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

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and `(B, Hq, Q)`, float32; 0 and -inf for rows that hold nothing.
    """
    batch, query_heads, queries, dim = query.shape
    heads = table.pool.keys.shape[0]
    groups = query_heads // heads
    bias = None if mask is None else PageBias(mask, batch, heads, groups)
    # (H, B, G * Q, D): queries of one KV head together, and a run shared by several rows takes all their queries.
    folded = query.reshape(batch, heads, groups * queries, dim).transpose(0, 1)
    plan = table.plan()
    value_dim = table.pool.values.shape[-1]
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    # A mask is turned into a bias of the size of the logits, which partial_attention bounds only for itself.
    logits_per_page = folded[..., 0].numel() * table.pool.page_size
    most = max(1, table.pool.capacity if bias is None else MAX_LOGITS // logits_per_page)
    for run in plan.runs:
        for piece in run.pieces(most, table.pool.count, table.pool.page_size):
            part = _attend_run(table, piece, folded, bias, scale, softcap)
            result = _add_rows(result, part, piece.rows, batch)
    for first in range(0, plan.scattered.shape[1], step := min(most, _gather_step(table, batch))):
        part = _attend_scattered(table, slice(first, first + step), folded, bias, scale, softcap)
        result = part if result is None else merge_partials(*result, *part)
    if result is None:
        result = _nothing(folded, value_dim)
    out, lse = result
    return (
        out.transpose(0, 1).reshape(batch, query_heads, queries, value_dim),
        lse.transpose(0, 1).reshape(batch, query_heads, queries),
    )


def _attend_run(
    table: PageTable, run: Run, folded: torch.Tensor, bias: PageBias | None, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to neighbouring pages in place, for all rows that share them: `(H, rows, G * Q, Dv)` and its LSE."""
    pool = table.pool
    size, heads, dim = pool.page_size, folded.shape[0], folded.shape[-1]
    rows = len(run.rows)
    query = folded if rows == folded.shape[1] else folded[:, run.rows]
    start, stop = run.start * size, run.stop * size
    hidden = None if bias is None else bias.shared(run.rows, pool.positions[run.start : run.stop].view(-1))
    out, lse = partial_attention(
        query.reshape(heads, -1, dim),
        pool.flat_keys[:, start:stop],
        pool.flat_values[:, start:stop],
        scale,
        hidden,
        _holes(table, run),
        softcap,
    )
    return out.view(heads, rows, -1, out.shape[-1]), lse.view(heads, rows, -1)


def _holes(table: PageTable, run: Run) -> torch.Tensor | None:
    """Return the empty slots of a run, counted from its first slot. Pages fill but never empty while a plan lasts."""
    pool = table.pool
    if not len(run.partial):
        return None
    return pool.index(run.slots[np.arange(pool.page_size) >= pool.count[run.partial, None]])


def _attend_scattered(
    table: PageTable, part: slice, folded: torch.Tensor, bias: PageBias | None, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to each row's scattered pages, gathered: `(H, B, G * Q, Dv)` and its LSE."""
    pool, plan = table.pool, table.plan()
    heads, batch, queries, dim = folded.shape
    ids = plan.scattered[:, part]
    index = pool.index(ids)
    keys, values = pool.gather(index)
    tokens = keys.shape[2]
    held = np.where(np.arange(part.start, part.start + ids.shape[1]) < plan.lengths[:, None], pool.count[ids], 0)
    empty = (np.arange(pool.page_size) >= held[:, :, None]).reshape(batch, tokens)
    hidden = None if bias is None else bias.per_row(pool.positions[index].view(batch, tokens))
    holes = None
    if batch == 1:
        holes = pool.index(np.flatnonzero(empty))
    else:
        # Rows have their holes at different places, which only a bias can say.
        gone = torch.from_numpy(np.where(empty, -np.inf, 0.0).astype(np.float32)).to(keys.device)
        by_lane = gone.repeat(heads, 1).unsqueeze(1)
        hidden = by_lane if hidden is None else hidden + by_lane
    out, lse = partial_attention(
        folded.reshape(heads * batch, queries, dim),
        keys.view(heads * batch, tokens, -1),
        values.view(heads * batch, tokens, -1),
        scale,
        hidden,
        holes,
        softcap,
    )
    return out.view(heads, batch, queries, -1), lse.view(heads, batch, queries)


def _gather_step(table: PageTable, batch: int) -> int:
    return max(1, MAX_GATHER_BYTES // (batch * table.pool.page_bytes))


def _nothing(folded: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = folded.shape[:3]
    out = torch.zeros((*shape, value_dim), dtype=torch.float32, device=folded.device)
    return out, out.new_full(shape, -torch.inf)


def _add_rows(
    result: tuple[torch.Tensor, torch.Tensor] | None,
    part: tuple[torch.Tensor, torch.Tensor],
    rows: list[int],
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a part that some rows read into the result of all, `(H, B, M, Dv)` and `(H, B, M)`."""
    if len(rows) == batch:
        return part if result is None else merge_partials(*result, *part)
    out, lse = result if result is not None else _empty_like(part, batch)
    merged_out, merged_lse = merge_partials(out[:, rows], lse[:, rows], *part)
    out[:, rows], lse[:, rows] = merged_out, merged_lse
    return out, lse


def _empty_like(part: tuple[torch.Tensor, torch.Tensor], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
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
