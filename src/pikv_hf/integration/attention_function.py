"""The attention function registered with transformers: partial attention over pages, merged by log-sum-exp."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.attention_call import AttentionCall
from ..attention.attention_mass import AttentionMass, own_masses
from ..attention.mask_bias import MaskBias
from ..attention.paged_attention import attend_pages
from ..common.foreign_attributes import LAYER_ATTRIBUTE, OBSERVER_ATTRIBUTE, PLAIN_ATTRIBUTE
from ..common.tensors import carried
from ..kernels import causal_attention, merge_pair
from ..kernels.merge_partials import merge_sinks
from ..layer.layer import PiKVLayer
from ..page_table.page_table import PageTable
from .kvpress_marks import forget_reader, without_marked
from .mask_function import new_tokens_valid, trailing_columns


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
    if attention_mask is not None and attention_mask.shape[-1] != (seen := layer.state.positions_seen):
        layer.rollback(query.shape[2])
        raise ValueError(
            f"layer {layer.layer_idx}: the attention mask spans {attention_mask.shape[-1]} positions, the cache {seen}"
        )
    if attention_mask is not None and layer.state.dropped:
        attention_mask = trailing_columns(attention_mask, layer.seen)
    layer.attend_begins(new_tokens_valid(attention_mask, query.shape[2]))
    layer.store.remember_queries(query, scale)
    if layer.pending is not None and layer.pending.keys.shape[2] == layer.seen and sinks is None and softcap is None:
        # The prompt: nothing is stored yet, so ordinary attention over the fresh K/V is all there is.
        output = sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scale)
        if layer.parts[0].scheduler is not None:
            _begin_step(layer)
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
    history_mask = None if layer.state.vetted and (mask is None or hasattr(mask, PLAIN_ATTRIBUTE)) else mask
    masses = [None if part.scheduler is None else AttentionMass() for part in layer.parts]
    out, lse = _attend_parts(layer, query, history_mask, scale, softcap, masses)
    if layer.pending is not None:
        new = _attend_new(query, layer.pending.keys, layer.pending.values, mask, scale, softcap)
        out, lse = merge_pair(out, lse, *new)
    if layer.parts[0].scheduler is not None:
        _begin_step(layer)
        total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
        for table, known in zip(layer.store.tables(), masses, strict=True):
            if known is not None:
                known.note(_by_kv_head(total.to(table.plain.device), table))
        _watch_new(layer, query, mask, scale, softcap, total)
    return out, lse


def _attend_parts(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    masses: Sequence[AttentionMass | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over what is stored, each part where it is: `(B, Hq, Q, Dv)` and its LSE `(B, Hq, Q)`, float32.

    Queries go to the parts, outputs and LSEs come back. Everything is launched before anything is waited for: devices
    work at the same time, each in its own stream.
    """
    exchange = layer.layout.exchange
    routes = query.shape[2] == 1 and mask is None and layer.pending is None
    if exchange is not None:
        exchange.agree(layer.layer_idx, layer.seen, query, _value_dim(layer), layer.prompt_mark, layer.leads)
        layer.prompt_mark = None
    with nullcontext() if exchange is None else exchange.joined(layer.layer_idx, query):
        # First of all, since a CPU waits for what its copies come after.
        there = [carried(query, part.device) for part in layer.parts]
        hidden = [None if mask is None else carried(mask, part.device) for part in layer.parts]
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Accelerators begin while a CPU computes.
        for index in sorted(range(len(layer.parts)), key=lambda number: layer.parts[number].device.type == "cpu"):
            part, table = layer.parts[index], layer.parts[index].table
            assert table is not None
            # A call with several new tokens has many queries, which together look everywhere.
            router = part.page_router if routes else None
            call = AttentionCall(scale, softcap, layer.seen, router, masses[index])
            results.append(attend_pages(table, there[index], hidden[index], call))
        home = [(carried(out, query.device), carried(lse, query.device)) for out, lse in results]
        merged = home[0]
        for other in home[1:]:
            merged = merge_pair(*merged, *other)
    return merged if exchange is None else exchange.merge(layer.layer_idx, layer.seen, query, *merged, layer.leads)


def _value_dim(layer: PiKVLayer) -> int:
    assert layer.table is not None
    return layer.table.plain.values.shape[-1]


def _begin_step(layer: PiKVLayer) -> None:
    """Let the parts' schedules count a step."""
    for part in layer.parts:
        if part.scheduler is not None and part.table is not None:
            part.scheduler.begin_step(part.table)


def _by_kv_head(lse: torch.Tensor, table: PageTable) -> torch.Tensor:
    """Return `(B, Hq, Q)` as `(H, rows, G * Q)`, rows being lanes where heads keep different tokens."""
    return lse.reshape(len(table.rows), table.plain.keys.shape[0], -1).transpose(0, 1)


def _watch_new(
    layer: PiKVLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    lse: torch.Tensor | None,
) -> None:
    """Tell the layer's scheduler of the queries, and how the call's own tokens are attended to."""
    if layer.parts[0].scheduler is None:
        return
    for part in layer.parts:
        if part.scheduler is not None:
            part.scheduler.remember_queries(query.to(part.device), scale)
    if (new := layer.pending) is not None:
        batch, heads = new.keys.shape[:2]
        bias = None
        if mask is not None:
            bias = MaskBias(mask, batch, heads, query.shape[1] // heads).new_tokens(new.tokens)
        new.masses = own_masses(query, new.keys, bias, scale, softcap, lse)


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
    bias = None if mask is None else MaskBias(mask, batch, heads, groups).new_tokens(tokens)
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
