"""Attention masks at logical lengths, read by the positions of stored tokens."""

from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..common.foreign_attributes import PLAIN_ATTRIBUTE, VALID_ATTRIBUTE


def pikv_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build the boolean mask of the library's SDPA implementation, or None where the mask is plain causal.

    Called by transformers with changing signatures, so that the arguments are only passed on. The mask spans logical
    positions; :class:`~pikv_hf.attention.mask_bias.MaskBias` picks the columns of the tokens that are stored.
    """
    attention_mask = kwargs.get("attention_mask")
    plain = (
        kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("kv_offset", 0) == 0
        and kwargs.get("allow_is_causal_skip", False)
        and (attention_mask is None or attention_mask.ndim == 2)
    )
    if plain and (attention_mask is None or bool(attention_mask.all())):
        return None
    mask = sdpa_mask(*args, **kwargs)
    if plain and mask is not None:
        setattr(mask, PLAIN_ATTRIBUTE, True)
    return mask


def new_tokens_valid(mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Tell real tokens from padding: a real token sees itself under every mask in use.

    Parameters
    ----------
    mask : torch.Tensor, optional
        `(B, 1 or Hq, Q, T)`, boolean or additive; the last Q columns are the new tokens.
    new : int
        Q.

    Returns
    -------
    torch.Tensor or None
        `(B, Q)` bool, or None if all tokens are real. Found once per mask, which all layers share.
    """
    if mask is None:
        return None
    if not hasattr(mask, VALID_ATTRIBUTE):
        diagonal = mask[..., -new:].diagonal(dim1=-2, dim2=-1)
        seen = diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
        valid = seen.any(dim=1)
        setattr(mask, VALID_ATTRIBUTE, None if bool(valid.all()) else valid)
    return getattr(mask, VALID_ATTRIBUTE)


def trailing_columns(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the last columns of a mask, for a layer whose older positions were replaced by fewer tokens."""
    cut = mask[..., -columns:]
    if hasattr(mask, PLAIN_ATTRIBUTE):
        setattr(cut, PLAIN_ATTRIBUTE, True)
    return cut
