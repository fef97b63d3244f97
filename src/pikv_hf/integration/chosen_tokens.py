"""The tokens that a model's own indexer has chosen for each query (DeepSeek-V3.2, MiniMax-M3): masks and columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layer.indexed_layer import IndexedLayer
from ..layer.layer import PiKVLayer
from ..layer.mask_columns import MaskColumns

#: What attention functions are called with: the positions of each query's tokens, `(B, Q, k)` integers.
INDICES = "indices"
#: What MiniMax-M3 calls them with: the blocks of positions of each query and group of heads, `(B, Hi, Q, n)` integers.
BLOCK_INDICES = "block_indices"


def check_indexers(link: Any, layers: Sequence[PiKVLayer], mask: Any) -> None:
    """Refuse a call that indexers could not follow, before any layer has changed.

    Parameters
    ----------
    link : Attachment
        Of the model that is called.
    layers : sequence of PiKVLayer
        The paged layers of its cache.
    mask : torch.Tensor or None
        What its first attention is called with.

    Raises
    ------
    NotImplementedError
        Under autocast, in which indexer keys come wider than K/V, and for padding after a row's first tokens, where
        indexers compare it.
    RuntimeError
        If an interrupted call has left layers at different lengths.
    """
    indexed = [layer for layer in layers if isinstance(layer, IndexedLayer)]
    if not indexed:
        return
    where, positions = f"layer {indexed[0].layer_idx}", sorted({layer.state.positions_seen for layer in layers})
    attention = link.attention_of(indexed[0].layer_idx)
    if len(positions) > 1:
        raise RuntimeError(
            f"an interrupted call has left layers at different lengths, {positions}; take its tokens back with "
            f"cache.crop({positions[0]})"
        )
    kind = next((p.device.type for p in attention.parameters()), "cpu") if attention is not None else "cpu"
    if torch.is_autocast_enabled(kind):
        raise NotImplementedError(
            f"{where}: under autocast the keys of an indexer come in float32 beside K/V in "
            f"{torch.get_autocast_dtype(kind)}, and pages hold one dtype; load the model in that dtype instead"
        )
    compares_padding = getattr(getattr(attention, "indexer", None), "block_size", None) is not None
    is_later = bool(positions[0]) and isinstance(mask, torch.Tensor)
    if compares_padding and is_later and MaskColumns.of(mask).new > 1 and MaskColumns.of(mask).new_valid is not None:
        raise NotImplementedError(
            f"{where}: {type(attention).__name__} compares padding, too, which can come with a row's first tokens "
            "alone; give prompts with padding in one piece"
        )


def chosen_positions(
    module: nn.Module, query: torch.Tensor, tokens: int, given: Mapping[str, Any]
) -> torch.Tensor | None:
    """Return the positions that the queries of a call read, `(B, 1 or Hi, Q, k)` int64, None for all.

    Negative ones choose nothing. With several Hi, each is of `Hq // Hi` neighbouring heads.

    Parameters
    ----------
    module : torch.nn.Module
        The attention.
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    tokens : int
        T, the positions there are.
    given : mapping
        Further arguments of the call.

    Raises
    ------
    NotImplementedError
        For what is neither positions nor blocks of them.
    """
    by_token, by_block = given.get(INDICES), given.get(BLOCK_INDICES)
    if by_token is None and by_block is None:
        return None
    batch, heads, queries, _ = query.shape
    if by_block is None:
        assert by_token is not None
        _check_integers(module, INDICES, by_token, (batch, queries))
        return by_token.long().unsqueeze(1)
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    groups = by_block.shape[1] if isinstance(by_block, torch.Tensor) and by_block.ndim == 4 else 1
    _check_integers(module, BLOCK_INDICES, by_block, (batch, groups, queries))
    if not isinstance(size, int) or heads % groups or by_token is not None or given.get("position_ids") is None:
        absent = "no " if given.get("position_ids") is None else ""
        twice = "" if by_token is None else ", and tokens beside them"
        raise NotImplementedError(
            f"{type(module).__name__} chooses blocks of {size} tokens for {groups} groups of {heads} heads{twice}, "
            f"with {absent}position_ids: PiKV's attention needs the size from its indexer's block_size, equal groups, "
            "positions, and nothing else chosen"
        )
    slots = torch.arange(size, device=by_block.device)
    every = (by_block.long().unsqueeze(-1) * size + slots).flatten(3)
    return every.where((every >= 0) & (every < tokens), -1)


def _check_integers(module: nn.Module, name: str, given: Any, shape: tuple[int, ...]) -> None:
    known = isinstance(given, torch.Tensor) and given.dtype in (torch.int32, torch.int64)
    if not known or given.shape[:-1] != shape:
        found = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else repr(given)
        raise NotImplementedError(
            f"{type(module).__name__} calls its attention with {name} that are no integers {(*shape, 'k')}, of each of "
            f"its queries: got {found}"
        )


def only_chosen(mask: torch.Tensor | None, positions: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """Return a mask that shows of `tokens` positions only what is chosen for a query and shown to it.

    Parameters
    ----------
    mask : torch.Tensor, optional
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive; None for causal.
    positions : torch.Tensor
        `(B, 1 or Hi, Q, k)` int64; negative ones choose nothing.
    heads, tokens : int
        Hq and T.
    """
    batch, groups, queries, _ = positions.shape
    chosen = torch.zeros((batch, groups, queries, tokens + 1), dtype=torch.bool, device=positions.device)
    chosen.scatter_(3, positions.where(positions >= 0, tokens), True)
    shown = chosen[..., :tokens]
    if groups > 1:
        shown = shown.repeat_interleave(heads // groups, dim=1)
    if mask is None:
        return shown.tril(tokens - queries)
    # As the models do: a query that is shown none of its tokens averages over all there are.
    both = mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
    MaskColumns.of(mask).carried_to(both)
    return both


def chosen_columns(mask: torch.Tensor | None, positions: torch.Tensor, heads: int) -> torch.Tensor | None:
    """Return the columns `(B, 1 or H, k)` int64 that one query reads, negative where a mask hides them.

    None for several queries, which together look everywhere, for masks with more to say than what is hidden, and for
    heads that choose otherwise than the layer's KV heads, H.
    """
    if positions.shape[2] != 1 or positions.shape[1] not in (1, heads):
        return None
    columns = positions[:, :, 0]
    if mask is None:
        return columns
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    shown = mask[:, :, 0].expand(*columns.shape[:2], -1).gather(2, columns.clamp_min(0))
    return columns.where(shown, -1)


def shown_to_blocks(mask: torch.Tensor | None, position_ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the boolean mask by which MiniMax-M3's attention to blocks goes, `(B or 1, 1 or Hq, Q, T)`.

    Parameters
    ----------
    mask : torch.Tensor, optional
        `(B or 1, 1 or Hq, Q, T)`; of an additive one what is not zero is hidden.
    position_ids : torch.Tensor
        `(B or 1, Q)` or `(Q,)`; without a mask they say what lies ahead, where transformers too makes none.
    tokens : int
        T.
    """
    if mask is None:
        positions = position_ids if position_ids.ndim > 1 else position_ids.unsqueeze(0)
        if 1 < (queries := positions.shape[1]) < tokens:
            return torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=positions.device).tril_(
                tokens - queries
            )
        return torch.arange(tokens, device=positions.device) <= positions[:, None, :, None]
    if mask.dtype == torch.bool:
        return mask
    shown = mask == 0
    MaskColumns.of(mask).carried_to(shown)
    return shown


def averaging(query: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return queries and mask of attention in parts, in which who is shown nothing averages over all tokens.

    In one piece adding the least number to all logits comes to the same; pieces would count alike, whatever their
    sizes. A query of zeros that is shown everything counts tokens.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, Q, D)`.
    mask : torch.Tensor
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive.

    Returns
    -------
    tuple
        Both, and whether there are such queries.
    """
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    blank = hidden.all(dim=-1, keepdim=True)
    if not bool(blank.any()):
        return query, mask, False
    columns = MaskColumns.of(mask)
    mask = mask | blank if mask.dtype == torch.bool else mask.masked_fill(blank, 0.0)
    columns.carried_to(mask)
    return query.masked_fill(blank, 0.0), mask, True


def as_averages(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a boolean mask as MiniMax-M3 adds it to logits: who is shown nothing averages over all tokens.

    What comes of padding so is what later layers compare of it.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
