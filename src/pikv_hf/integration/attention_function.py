"""The attention function registered with transformers: it attends over the layer that keys refer to."""

import dataclasses
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..allocation.observed_queries import ObservedCall
from ..attention.attention_mass import OBSERVED
from ..attention.dense_attention import dense_attention, needs_gradients
from ..attention.mask_bias import MaskBias
from ..common.foreign_attributes import OBSERVER_ATTRIBUTE
from ..common.tensors import autocast_dtype
from ..kernels.merge_partials import merge_sinks
from ..layer.attend import attend, attend_dense, begin_step, note_queries
from ..layer.layer import PiKVLayer
from ..layer.layer_codecs import remember_queries
from ..layer.layer_reads import with_history
from ..layer.layer_reference import LayerReference
from ..layer.mask_columns import MaskColumns, new_tokens_valid
from .call_arguments import check_arguments, check_causal, is_causal
from .chosen_tokens import (
    BLOCK_INDICES,
    INDICES,
    as_averages,
    averaging,
    chosen_columns,
    chosen_positions,
    only_chosen,
    shown_to_blocks,
)
from .continuous_batching import attend_batched, is_batched
from .expanded_history import attend_expanded, expanding_is_cheaper
from .kvpress_marks import forget_reader, without_marked
from .latent_attention import absorbed_queries, expanded_outputs, expands_latents, holds_latents, layer_of_latents
from .mask_function import columns_of_layer
from .noted_call import NOTING, attend_to_nothing
from .query_turns import running_turn
from .running_attention import check_running_was_read


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
        `s_aux` (attention sinks, `(Hq,)`), `softcap`, and what each query reads of all tokens (`indices`, `(B, Q, k)`
        positions, or `block_indices`, `(B, Hi, Q, n)`) are handled; the rest concerns other implementations.

    Returns
    -------
    tuple
        `(B, Q, Hq, Dv)` and None: the attention weights are never formed.
    """
    if NOTING.note is not None:
        NOTING.note(query, attention_mask, {"scaling": scaling, **kwargs})
        return attend_to_nothing(query, value)
    layer = LayerReference.on(key, value) or layer_of_latents(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if "read_index" in kwargs and is_batched(kwargs):
        return attend_batched(module, query, key, value, scale, kwargs)
    call = _Call(module, query, attention_mask, scale, kwargs.get("s_aux"), kwargs.get("softcap"))
    call.keeps_padding = kwargs.get(BLOCK_INDICES) is not None
    if isinstance(layer, PiKVLayer):
        store = layer.store
        mask, seen, pending = _checked_mask(layer, call, dropout, kwargs), store.state.seen, store.pending
        # A module looks long for what it does not have.
        if OBSERVER_ATTRIBUTE in vars(module):
            call.show_to_observer(seen, key)
        call.query, call.mask = query.to(store.dtype), mask
        if call.keeps_padding:
            call.mask = shown_to_blocks(mask, kwargs["position_ids"], seen)
        new = 1 if pending is None else pending.tokens
        if key.shape[2] > new:
            # Of a layer that has given away all its tokens, for want of a reference, the new ones are the last.
            key, value = key[:, :, -new:], value[:, :, -new:]
        attend_layer = _attend_layer if call.is_of(layer) else _attend_shared
        return attend_layer(layer, call, key, value).to(autocast_dtype(query)), None
    check_running_was_read(module)
    check_arguments(module, kwargs)
    call.show_to_observer(key.shape[2], key)
    if key.shape[2] == query.shape[2]:
        forget_reader(module)
    if (positions := chosen_positions(module, query, key.shape[2], kwargs)) is not None:
        if call.keeps_padding:
            call.mask = shown_to_blocks(call.mask, kwargs["position_ids"], key.shape[2])
        call.mask = only_chosen(call.mask, positions, query.shape[1], key.shape[2])
        call.mask = as_averages(call.mask, query.dtype) if call.keeps_padding else call.mask
    elif attention_mask is None and 1 < query.shape[2] < key.shape[2] and is_causal(module, kwargs):
        call.mask = _trailing_causal_mask(query, key)
    if call.sinks is None and call.softcap is None:
        # As registered: kvpress has wrapped it, to hide what its head-wise presses have marked.
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, call.mask, dropout=dropout, scaling=scale, **kwargs)
    call.mask = without_marked(module, query, key, call.mask)
    return _attend_foreign(call, key, value), None


@dataclasses.dataclass(slots=True)
class _Call:
    """What an attention module asks for.

    Attributes
    ----------
    module : torch.nn.Module
        The attention module.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask : torch.Tensor or None
        `(B, 1 or Hq, Q, T)`, None for causal.
    scale : float
        Factor on the logits.
    sinks : torch.Tensor or None
        `(Hq,)` attention sinks.
    softcap : float or None
        Caps the logits.
    positions : torch.Tensor or None
        `(B, 1 or Hi, Q, k)`, those that each query reads, None for all.
    keeps_padding : bool
        Whether padding is stored like other tokens, since an indexer that is told of no masks compares it, too.
    """

    module: torch.nn.Module
    query: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    sinks: torch.Tensor | None
    softcap: float | None
    positions: torch.Tensor | None = None
    keeps_padding: bool = False

    def is_of(self, layer: PiKVLayer) -> bool:
        """Return whether the layer is the attention's own, not that of another whose K/V it shares."""
        return getattr(self.module, "layer_idx", layer.layer_idx) == layer.layer_idx

    def show_to_observer(self, tokens: int, key: torch.Tensor) -> None:
        """Call what a press has put on the module; `tokens` are those of the layer with the new ones, the last keys."""
        if (observer := vars(self.module).get(OBSERVER_ATTRIBUTE)) is not None:
            observer(self.observed(tokens, key))

    def observed(self, tokens: int, key: torch.Tensor) -> ObservedCall:
        """Return what an observer is shown; `tokens` are those of the layer with the new ones, the last keys."""
        new = self.query.shape[2]
        valid, keys = new_tokens_valid(self.mask, new), key[:, :, -new:] if key.shape[2] >= new else None
        given = self.query, tokens - new, valid, self.scale, self.sinks, self.softcap
        return ObservedCall(*given, keys, running_turn(self.module))

    def output(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Return `(B, Hq, Q, Dv)` and its LSE as transformers wants it, sinks included: `(B, Q, Hq, Dv)`."""
        if self.sinks is not None:
            out = merge_sinks(out, lse, self.sinks)
        return out.to(self.query.dtype).transpose(1, 2).contiguous()

    def dense_output(
        self, keys: torch.Tensor, values: torch.Tensor, stored: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over dense K/V, differentiably: `(B, Q, Hq, Dv)`.

        `stored` is `(B, H, T)` bool, False for columns without a token.
        """
        batch, heads, tokens, _ = keys.shape
        mask = _trailing_causal_mask(self.query, keys) if self.mask is None else self.mask
        bias = MaskBias(mask, batch, heads, self.query.shape[1] // heads).new_tokens(tokens)
        if stored is not None:
            bias = bias.masked_fill(~stored[:, :, None, None], -torch.inf)
        out = dense_attention(self.query * self.scale, keys, values, bias, self.softcap, self.sinks)
        return out.transpose(1, 2).contiguous()


def _attend_layer(layer: PiKVLayer, call: _Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend over a layer's pages and the new tokens, `(B, H, Q, D)` and `(B, H, Q, Dv)`: `(B, Q, Hq, Dv)`."""
    # A decoded token is stored whatever its own mask says of it, so that a later one may show it.
    store, seen = layer.store, layer.store.state.seen
    decodes = call.query.shape[2] == 1 and seen > 1
    layer.attend_begins(None if call.keeps_padding or decodes else _stored_tokens(call.mask))
    pending, absorbed = store.pending, holds_latents(layer, call.module)
    is_prompt = pending is not None and pending.tokens == seen and call.sinks is None and call.softcap is None
    expands = absorbed and not is_prompt and _expands(layer, call, key, value)
    columns = None if call.positions is None else _take_chosen(layer, call)
    if not is_prompt and call.mask is not None and (call.keeps_padding or call.mask.dtype != torch.bool):
        call.query, call.mask, averages = averaging(call.query, call.mask)
        columns = None if averages else columns
    query, mask = call.query, call.mask
    if absorbed:
        # Where attention is cheaper as it comes, as over the tokens of a prompt alone, few queries are looked at.
        query = absorbed_queries(call.module, query[:, :, -OBSERVED:] if is_prompt or expands else query)
        # Behind rotary keys are those of an indexer, which attention has no part of.
        query = torch.nn.functional.pad(query, (0, store.indexer_width))
    remember_queries(store, query, call.scale)
    joint = None if decodes else layer.edits.joint
    if joint is not None:
        joint.observe(layer.edits, call.observed(seen, key))
    if is_prompt:
        # Nothing is stored yet, so ordinary attention over the fresh K/V is all there is.
        shown = as_averages(mask, query.dtype) if call.keeps_padding and mask is not None else mask
        output, _ = sdpa_attention_forward(call.module, call.query, key, value, shown, 0.0, call.scale)
        if layer.parts[0].scheduler is not None:
            begin_step(layer)
            note_queries(layer, query, mask, call.scale, None, None, absorbed)
    elif expands:
        output = attend_expanded(layer, call.module, call.query, key, value, mask, call.scale)
    else:
        out, lse = attend(layer, query, mask, call.scale, call.softcap, call.sinks, absorbed, columns)
        if store.indexer_dim and not absorbed:
            out = out[..., : out.shape[-1] - store.indexer_width]
        output = call.output(out, lse)
        if absorbed:
            output = expanded_outputs(call.module, output)
        if torch.is_grad_enabled() and needs_gradients(query, key, value, call.sinks):
            output = _with_gradients(output, layer, call, key, value)
    layer.attend_ends()
    if joint is not None:
        joint.ends(layer.edits)
    return output


def _take_chosen(layer: PiKVLayer, call: _Call) -> torch.Tensor | None:
    """Have a call's mask show chosen positions alone; return the columns that are read of full pages, None for all."""
    assert call.positions is not None
    columns = chosen_columns(call.mask, call.positions, layer.store.heads)
    call.mask = only_chosen(call.mask, call.positions, call.query.shape[1], layer.seen)
    return columns


def _expands(layer: PiKVLayer, call: _Call, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether a call over latents takes keys and values of all heads: of many queries, and what SDPA can do."""
    if call.sinks is not None or call.softcap is not None or needs_gradients(call.query, key, value, None):
        return False
    return expanding_is_cheaper(call.module, layer, call.query.shape[2])


def _attend_shared(layer: PiKVLayer, call: _Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend over another layer's pages and the tokens that it has got in this call, `(B, Q, Hq, Dv)`.

    Gemma does so in later layers, of a prompt for the last queries alone. The layer's own attention has run, so that
    nothing of it is waited for any more, and its tokens may be stored by now.
    """
    queries, seen = call.query.shape[2], layer.seen
    if call.mask is None and queries > 1 and (layer.pending is None or queries < layer.pending.tokens):
        call.mask = torch.ones((1, 1, queries, seen), dtype=torch.bool, device=key.device).tril_(seen - queries)
    output = call.output(*attend(layer, call.query, call.mask, call.scale, call.softcap, call.sinks))
    if needs_gradients(call.query, key, value, call.sinks):
        output = _with_gradients(output, layer, call, key, value)
    return output


def _attend_foreign(call: _Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend over all of another cache's K/V, with sinks or a cap, which SDPA does not know: `(B, Q, Hq, Dv)`."""
    dtype = autocast_dtype(call.query)
    call.query, key, value = call.query.to(dtype), key.to(dtype), value.to(dtype)
    if needs_gradients(call.query, key, value, call.sinks):
        return call.dense_output(key, value)
    return call.output(*attend_dense(call.query, key, value, call.mask, call.scale, call.softcap))


def _with_gradients(
    output: torch.Tensor, layer: PiKVLayer, call: _Call, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return an output `(B, Q, Hq, Dv)` as it is, with the gradients of attention over all that is stored.

    Pages are read by kernels that autograd does not follow, so the same is computed again, densely, from which come the
    gradients for the queries and the call's own K/V. What was stored before is a constant.
    """
    keys, values = layer.dense()
    before, stored = keys.shape[2] - key.shape[2], layer.stored_mask()
    past = keys[:, :, :before], values[:, :, :before]
    if expands_latents(type(call.module)):
        expand: Any = call.module.expand_kv
        past = expand(*past) if before else (key[:, :, :0], value[:, :, :0])
        stored = stored.expand(-1, key.shape[1], -1)
    dense = call.dense_output(*with_history(past, key, value), stored)
    return output.detach() + (dense - dense.detach())


def _stored_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return which of the new tokens are stored, `(B, Q)` bool, None for all: those that no 2-D mask calls padding."""
    if mask is None or (valid := MaskColumns.of(mask).new_valid) is None:
        return None
    return torch.from_numpy(valid).to(mask.device)


def _checked_mask(layer: PiKVLayer, call: _Call, dropout: float, given: dict[str, Any]) -> torch.Tensor | None:
    """Return the mask by the layer's columns; refuse what cannot be done, and take back what the layer has just got."""
    try:
        _check_call(layer, call, dropout, given)
        return columns_of_layer(layer, call.mask)
    except (ValueError, NotImplementedError):
        if call.is_of(layer):
            layer.rollback(call.query.shape[2])
        raise


def _check_call(layer: PiKVLayer, call: _Call, dropout: float, given: dict[str, Any]) -> None:
    """Refuse a call of another model, and what attention would have to do otherwise than asked."""
    where = f"layer {layer.layer_idx}"
    check_arguments(call.module, given)
    if INDICES in given or BLOCK_INDICES in given:
        call.positions = chosen_positions(call.module, call.query, layer.store.state.seen, given)
    if call.positions is not None and (layer.state.dropped or layer.state.assigned or not call.is_of(layer)):
        raise NotImplementedError(
            f"{where}: attention reads chosen positions, and those of tokens from outside, or of another layer, are "
            "not known"
        )
    if layer.attachment is not None and not layer.attachment.owns(call.module):
        raise ValueError(
            f"{where}: the cache was made for another model than the one that {type(call.module).__name__} "
            "belongs to, or its modules were replaced since: make one with PiKVCache.for_model(model), or attach(model)"
        )
    if dropout:
        raise ValueError(f"{where}: attention dropout is {dropout}, but cached attention has none; call model.eval()")
    if call.query.shape[2] > 1:
        check_causal(where, call.module, given, call.mask)


def _trailing_causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the causal mask of queries that are the last of the keys; SDPA's own flag aligns them with the first."""
    queries, tokens = query.shape[2], key.shape[2]
    return torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=query.device).tril_(tokens - queries)
