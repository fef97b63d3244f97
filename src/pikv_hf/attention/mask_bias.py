"""The columns of an attention mask at the positions of stored tokens, as a bias on logits."""

import torch


def as_bias(mask: torch.Tensor) -> torch.Tensor:
    """Turn a boolean mask (True: visible) into one to add to logits; a float mask is returned in float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)


def mask_by_lane(mask: torch.Tensor, batch: int, lanes: int) -> torch.Tensor:
    """Return a mask `(B or 1, 1 or Hq, Q, T)` for rows of one KV head each, `(B * H, 1 or G, Q, T)`."""
    expanded = mask.expand(batch, -1, -1, -1)
    if expanded.shape[1] == 1:
        return expanded.expand(-1, lanes, -1, -1).reshape(batch * lanes, 1, *mask.shape[2:])
    return expanded.reshape(batch * lanes, -1, *mask.shape[2:])


class MaskBias:
    """Picks the columns of an attention mask for stored tokens, by their positions.

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
