"""Attention over everything that a layer holds: each part where it is, and what is pending, merged by log-sum-exp."""

import dataclasses
from collections.abc import Sequence

import torch

from ..attention.attention_call import AttentionCall
from ..attention.attention_mass import AttentionMass, own_masses
from ..attention.mask_bias import MaskBias
from ..attention.paged_attention import attend_pages
from ..common.tensors import to_device
from ..kernels import causal_attention, merge_pair
from ..page_table.page_table import PageTable
from .layer import PiKVLayer
from .layer_operation import layer_operation
from .mask_columns import MaskColumns
from .pending_tokens import PendingTokens


@layer_operation
def attend(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    absorbed: bool = False,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over everything that a layer holds, pending tokens included.

    Parameters
    ----------
    layer : PiKVLayer
        Its newest Q tokens are the queries' own.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask, scale, softcap
        `(B, 1 or Hq, Q, T)` boolean or additive, or None for causal; the factor on the logits, by default `D ** -0.5`;
        and what caps them.
    sinks : torch.Tensor, optional
        `(Hq,)` attention sinks. The result leaves them out; they lessen the fraction of the attention that pages take.
    absorbed : bool
        Whether the layer holds latents, as :func:`pikv_hf.kernels.partial_attention` has it.
    columns : torch.Tensor, optional
        `(B, 1 or H, k)` int64, the only ones that are read of full pages; a mask hides all others, too.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Q, Dv)` and its LSE `(B, Hq, Q)`, float32.
    """
    store, pending = layer.store, layer.store.pending
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    history_mask = mask if mask is not None and _hides_history(layer, mask) else None
    # A call with several new tokens has many queries, which together look everywhere.
    may_choose = query.shape[2] == 1 and history_mask is None and pending is None
    masses: list[AttentionMass | None] = []
    calls: list[AttentionCall] = []
    for part in store.parts:
        masses.append(None if part.scheduler is None else AttentionMass())
        page_router = part.page_router if may_choose else None
        calls.append(AttentionCall(scale, softcap, store.state.seen, page_router, masses[-1], absorbed, columns))
    out, lse = _attend_stored(layer, query, history_mask, calls)
    if pending is not None:
        new = attend_dense(query, *_tokens_of(pending, absorbed), mask, scale, softcap)
        out, lse = merge_pair(out, lse, *new)
    if store.parts[0].scheduler is not None:
        begin_step(layer)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
        for table, known in zip(layer.store.tables(), masses, strict=True):
            if known is not None:
                known.note(_by_kv_head(total.to(table.plain.device), table))
        note_queries(layer, query, mask, scale, softcap, total, absorbed, sinks)
    return out, lse


def _tokens_of(pending: PendingTokens, absorbed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of new tokens: of latents the keys have their rotary parts behind them."""
    if not absorbed:
        return pending.keys, pending.values
    return torch.cat([pending.keys, pending.values], dim=-1), pending.keys


def _hides_history(layer: PiKVLayer, mask: torch.Tensor) -> bool:
    """Return whether a mask hides something that is stored from one of the queries."""
    columns = MaskColumns.of(mask)
    # A decoded token is stored at once, although its own query may not see it.
    hides_itself = layer.pending is None and columns.new_valid is not None
    return hides_itself or not columns.is_causal or columns.hides_stored(layer.state.padding)


def _attend_stored(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    calls: Sequence[AttentionCall],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over what is stored, in all processes: `(B, Hq, Q, Dv)` and its LSE `(B, Hq, Q)`, float32."""
    if (exchange := layer.exchange) is None:
        return _attend_parts(layer, query, mask, calls)
    assert layer.table is not None
    plain = layer.table.plain
    value_dim = (plain.keys if calls[0].absorbed else plain.values).shape[-1]
    exchange.agree(layer.layer_idx, layer.seen, query, value_dim, layer.prompt_mark, layer.leads)
    layer.prompt_mark = None
    with exchange.joined(layer.layer_idx, query):
        out, lse = _attend_parts(layer, query, mask, calls)
    return exchange.merge(layer.layer_idx, layer.seen, query, out, lse, layer.leads)


def _attend_parts(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    calls: Sequence[AttentionCall],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the parts of this process, each where it is.

    Queries go to the parts, outputs and LSEs come back. Everything is launched before anything is waited for: devices
    work at the same time, each in its own stream.
    """
    parts = layer.parts
    if len(parts) == 1 and (table := parts[0].table) is not None and table.plain.device == query.device:
        return attend_pages(table, query, mask, calls[0])
    # First of all, since a CPU waits for what its copies come after.
    there = [to_device(query, part.device) for part in parts]
    hidden = [None if mask is None else to_device(mask, part.device) for part in parts]
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Accelerators begin while a CPU computes.
    for index in sorted(range(len(parts)), key=lambda number: parts[number].device.type == "cpu"):
        part, table, call = parts[index], parts[index].table, calls[index]
        assert table is not None
        if call.columns is not None:
            call = dataclasses.replace(call, columns=to_device(call.columns, part.device))
        results.append(attend_pages(table, there[index], hidden[index], call))
    home = [(to_device(out, query.device), to_device(lse, query.device)) for out, lse in results]
    merged = home[0]
    for other in home[1:]:
        merged = merge_pair(*merged, *other)
    return merged


@layer_operation
def begin_step(layer: PiKVLayer) -> None:
    """Let the schedulers of a layer count a step of attention."""
    for part in layer.parts:
        if part.scheduler is not None and part.table is not None:
            part.scheduler.begin_step(part.table)


def _by_kv_head(lse: torch.Tensor, table: PageTable) -> torch.Tensor:
    """Return `(B, Hq, Q)` as `(H, rows, G * Q)`, rows being lanes where heads keep different tokens."""
    return lse.reshape(len(table.rows), table.plain.keys.shape[0], -1).transpose(0, 1)


@layer_operation
def note_queries(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    lse: torch.Tensor | None,
    absorbed: bool = False,
    sinks: torch.Tensor | None = None,
) -> None:
    """Tell the schedulers of a layer the queries of a call, and note how its own tokens are attended to.

    `sinks` are the `(Hq,)` logits of attention sinks. `lse` is `(B, Hq, Q)`, over everything that the queries saw; None
    where that is the call's own tokens alone.
    """
    for part in layer.parts:
        if part.scheduler is not None:
            assert part.table is not None
            # As wide as what bounds are kept of.
            known = query[..., : part.table.plain.bounds_dim]
            part.scheduler.remember_queries(known.to(part.device), scale, softcap, sinks)
    if (new := layer.pending) is not None:
        batch, heads = new.keys.shape[:2]
        bias = None
        if mask is not None:
            bias = MaskBias(mask, batch, heads, query.shape[1] // heads).new_tokens(new.tokens)
        new.masses = own_masses(query, _tokens_of(new, absorbed)[0], bias, scale, softcap, lse)


def attend_dense(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to dense tokens, causally unless a mask says otherwise: `(B, Hq, Q, Dv)` and its LSE."""
    batch, query_heads, queries, dim = query.shape
    heads, tokens = keys.shape[1:3]
    groups = query_heads // heads
    bias = None if mask is None else MaskBias(mask, batch, heads, groups).new_tokens(tokens)
    grouped = query.reshape(batch, heads, groups, queries, dim)
    out, lse = causal_attention(grouped, keys, values, scale, bias, softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)
