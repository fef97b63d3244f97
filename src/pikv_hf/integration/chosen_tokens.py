"""The tokens that a model's own indexer has chosen for each query (DeepSeek-V3.2, GLM-5): masks and columns of them."""

import torch
from torch import nn

from ..common.foreign_attributes import COLUMNS_ATTRIBUTE
from ..layer.mask_columns import MaskColumns

#: What attention functions are called with for them: `(B, Q, k)` integers, the positions of each query's tokens.
INDICES = "indices"


def check_indices(module: nn.Module, indices: object, query: torch.Tensor) -> torch.Tensor | None:
    """Return what a call gives as chosen positions, `(B, Q, k)` integers or None; refuse what is no such thing."""
    if indices is None:
        return None
    batch, _, queries, _ = query.shape
    is_known = isinstance(indices, torch.Tensor) and indices.dtype in (torch.int32, torch.int64)
    if not isinstance(indices, torch.Tensor) or not is_known or indices.shape[:-1] != (batch, queries):
        given = f"{tuple(indices.shape)} {indices.dtype}" if isinstance(indices, torch.Tensor) else repr(indices)
        raise NotImplementedError(
            f"{type(module).__name__} calls its attention with indices that are no positions for each of its queries, "
            f"({batch}, {queries}, k) integers: got {given}"
        )
    return indices


def only_chosen(mask: torch.Tensor | None, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a mask that shows of `tokens` positions only what is chosen for a query and shown to it.

    Parameters
    ----------
    mask : torch.Tensor, optional
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive; None for causal.
    indices : torch.Tensor
        `(B, Q, k)` integers; negative ones choose nothing.
    tokens : int
        T.
    """
    batch, queries, _ = indices.shape
    chosen = torch.zeros((batch, queries, tokens + 1), dtype=torch.bool, device=indices.device)
    index = indices.long()
    chosen.scatter_(2, index.where(index >= 0, tokens), True)
    shown = chosen[:, None, :, :tokens]
    if mask is None:
        return shown.tril(tokens - queries)
    both = mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, -torch.inf)
    # A token that no query has chosen is no padding.
    columns = MaskColumns.of(mask)
    setattr(both, COLUMNS_ATTRIBUTE, MaskColumns(columns.shown, queries, False, columns.tells_padding, both._version))
    return both


def chosen_columns(mask: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor | None:
    """Return the columns `(B, k)` int64 that one query reads, negative where a mask hides them.

    None for several queries, which together look everywhere, and for masks with more to say than what is hidden.
    """
    if indices.shape[1] != 1 or (mask is not None and mask.dtype != torch.bool):
        return None
    columns = indices[:, 0].long()
    if mask is None:
        return columns
    shown = mask[:, 0, 0].expand(len(columns), -1).gather(1, columns.clamp_min(0))
    return columns.where(shown, -1)
