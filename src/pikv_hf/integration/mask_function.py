"""Attention masks at logical lengths, read by the positions of stored tokens."""

from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

# Set on a mask that only hides the future and padding: no stored token is padding, so history needs no mask then.
PLAIN_ATTRIBUTE = "_pikv_plain"
_VALID_ATTRIBUTE = "_pikv_valid"


def pikv_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build the boolean mask of the library's SDPA implementation, or None where the mask is plain causal.

    Called by transformers with changing signatures, so that the arguments are only passed on. The mask spans logical
    positions; :class:`PageBias` picks the columns of the tokens that are stored.
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


def as_bias(mask: torch.Tensor) -> torch.Tensor:
    """Turn a boolean mask (True: visible) into one to add to logits; a float mask is returned in float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)


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
    if not hasattr(mask, _VALID_ATTRIBUTE):
        diagonal = mask[..., -new:].diagonal(dim1=-2, dim2=-1)
        seen = diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2
        valid = seen.any(dim=1)
        setattr(mask, _VALID_ATTRIBUTE, None if bool(valid.all()) else valid)
    return getattr(mask, _VALID_ATTRIBUTE)


def trailing_columns(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the last columns of a mask, for a layer whose older positions were replaced by fewer tokens."""
    cut = mask[..., -columns:]
    if hasattr(mask, PLAIN_ATTRIBUTE):
        setattr(cut, PLAIN_ATTRIBUTE, True)
    return cut


def by_lane(mask: torch.Tensor, batch: int, lanes: int) -> torch.Tensor:
    """Return a mask `(B or 1, 1 or Hq, Q, T)` for rows of one KV head, `(B * H, 1 or G, Q, T)`."""
    expanded = mask.expand(batch, -1, -1, -1)
    if expanded.shape[1] == 1:
        return expanded.expand(-1, lanes, -1, -1).reshape(batch * lanes, 1, *mask.shape[2:])
    return expanded.reshape(batch * lanes, -1, *mask.shape[2:])


class PageBias:
    """The mask's columns for stored tokens.

    Parameters
    ----------
    mask : torch.Tensor
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive, T the logical length.
    heads, groups : int
        KV heads, and query heads per KV head.
    """

    def __init__(self, mask: torch.Tensor, batch: int, heads: int, groups: int) -> None:
        self.mask = mask.expand(batch, -1, -1, -1)
        self.heads, self.groups = heads, groups

    def shared(self, rows: list[int], positions: torch.Tensor) -> torch.Tensor:
        """Return the bias for tokens at `positions` `(T,)` shared by `rows`, as `(H or 1, len(rows) * G * Q, T)`."""
        mask = self.mask if len(rows) == self.mask.shape[0] else self.mask[rows]
        picked = as_bias(mask.index_select(-1, self._columns(positions)))
        rows_first = self._split_heads(picked)
        return rows_first.transpose(0, 1).reshape(rows_first.shape[1], -1, positions.numel())

    def per_row(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the bias for each row's own tokens at `positions` `(B, T)`, as `(H * B, G * Q, T)`."""
        index = self._columns(positions)[:, None, None, :]
        picked = as_bias(self.mask.gather(-1, index.expand(-1, *self.mask.shape[1:3], -1)))
        rows_first = self._split_heads(picked).expand(-1, self.heads, -1, -1, -1)
        return rows_first.transpose(0, 1).reshape(-1, self.groups * picked.shape[2], positions.shape[1])

    def new_tokens(self, new: int) -> torch.Tensor:
        """Return the bias among the `new` newest tokens, broadcastable to `(B, H, G, Q, Q)`."""
        return self._split_heads(as_bias(self.mask[..., -new:]))

    def _columns(self, positions: torch.Tensor) -> torch.Tensor:
        # Slots without a token, which are hidden anyway, may carry any position.
        return positions.clamp(0, self.mask.shape[-1] - 1).long()

    def _split_heads(self, bias: torch.Tensor) -> torch.Tensor:
        """Turn `(B, 1 or Hq, Q, T)` into `(B, 1 or H, G, Q, T)`."""
        batch, heads, queries, tokens = bias.shape
        if heads == 1:
            return bias[:, :, None].expand(batch, 1, self.groups, queries, tokens)
        return bias.view(batch, self.heads, self.groups, queries, tokens)
