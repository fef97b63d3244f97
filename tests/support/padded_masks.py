"""Masks for attention functions that are called without a model, as a model makes them of a 2-D mask."""

import numpy as np
import torch

from pikv_hf.common.foreign_attributes import COLUMNS_ATTRIBUTE
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
