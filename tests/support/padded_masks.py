"""Masks for attention functions that are called without a model, as a model makes them of a 2-D mask."""

import numpy as np
import torch

from pikv_hf.common.foreign_attributes import COLUMNS_ATTRIBUTE
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.mask_columns import MaskColumns


def of_padding(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return a mask `(B, 1, Q, T)` whose hidden new tokens, False in `valid` `(B, Q)`, are known to be padding."""
    seen = MaskColumns.of(mask).shown[:, : -valid.shape[1]]
    columns = MaskColumns(np.concatenate([seen, valid.numpy()], axis=1), valid.shape[1], tells_padding=True)
    setattr(mask, COLUMNS_ATTRIBUTE, columns)
    return mask


def only_padding(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return a mask `(B, 1, Q, T)` that hides nothing but the future and what is False in `valid` `(B, T)`."""
    setattr(mask, COLUMNS_ATTRIBUTE, MaskColumns(valid.numpy(), mask.shape[2], is_causal=True, tells_padding=True))
    return mask


def going_on(layer: PiKVLayer, new: int) -> torch.Tensor | None:
    """Return the mask of a call whose `new` real tokens the layer has already: it goes on to hide padding."""
    if (padding := layer.state.padding) is None:
        return None
    dropped, seen = layer.state.dropped, layer.state.positions_seen
    shown = torch.ones(len(padding), seen, dtype=torch.bool)
    shown[:, dropped : dropped + padding.shape[1]] = ~torch.from_numpy(padding)
    causal = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    return only_padding((causal & shown[:, None])[:, None], shown)
