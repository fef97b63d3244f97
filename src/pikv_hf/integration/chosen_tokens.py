"""The tokens that a model's own indexer has chosen for each query (DeepSeek-V3.2, MiniMax-M3): masks and columns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layer.mask_columns import MaskColumns

#: What attention functions are called with: the positions of each query's tokens, `(B, Q, k)` integers.
INDICES = "indices"
#: What MiniMax-M3 calls them with: the blocks of positions of each query and group of heads, `(B, Hi, Q, n)` integers.
BLOCK_INDICES = "block_indices"


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
        raise NotImplementedError(
            f"{type(module).__name__} chooses blocks of {size} tokens for {groups} groups of {heads} heads, with "
            f"position_ids={given.get('position_ids')!r} and indices={by_token!r}: PiKV's attention needs a size, "
            "equal groups, positions, and nothing chosen twice"
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
    both = mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, -torch.inf)
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


def as_averages(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask as MiniMax-M3 adds a boolean one to logits: who sees nothing gets the average of all tokens.

    What comes of padding so is what later layers compare of it.
    """
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
