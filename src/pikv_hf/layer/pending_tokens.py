"""Tokens of a call that are not stored yet."""

import dataclasses

import torch


@dataclasses.dataclass(slots=True)
class PendingTokens:
    """The new K/V of a call with several tokens, until the layer's router has chosen their experts.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`, the model's own tensors.
    valid : torch.Tensor or None
        `(B, Q)` bool, False for padding; None if every token counts.
    experts : torch.Tensor or None
        `(B, Q)` integers, once the router has chosen them while the layer waits for a press.
    masses : torch.Tensor or None
        `(B, H, Q)` float32, how much attention they got from the newest queries, for scheduling.
    awaits_indexer : bool
        Whether the last channels of the values are for the keys of an indexer, which have yet to come.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    masses: torch.Tensor | None = None
    awaits_indexer: bool = False

    @property
    def tokens(self) -> int:
        """Q, the new tokens per row."""
        return self.keys.shape[2]

    def check_indexed(self, layer_idx: int) -> None:
        """Raise `RuntimeError` if the keys of an indexer have not come: these tokens cannot be stored."""
        if self.awaits_indexer:
            raise RuntimeError(
                f"layer {layer_idx}: the last call was interrupted before the keys of its indexer came; take its "
                "tokens back with cache.crop(length)"
            )

    def select(self, rows: torch.Tensor) -> "PendingTokens":
        """Return the rows at these indices."""
        valid = None if self.valid is None else self.valid[rows]
        experts = None if self.experts is None else self.experts[rows]
        masses = None if self.masses is None else self.masses[rows]
        return PendingTokens(self.keys[rows], self.values[rows], valid, experts, masses, self.awaits_indexer)

    def to(self, device: torch.device) -> "PendingTokens":
        """Return the tokens on another device, or these if they are there."""
        if self.keys.device == device:
            return self
        parts = [self.keys, self.values, self.valid, self.experts, self.masses]
        keys, values, valid, experts, masses = (None if part is None else part.to(device) for part in parts)
        assert keys is not None
        assert values is not None
        return PendingTokens(keys, values, valid, experts, masses, self.awaits_indexer)


def tokens_by_lane(tokens: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return `(B, H, Q, D)` as the table's rows have it, `(B * H, 1, Q, D)` if these are lanes of one KV head."""
    return tokens if lanes == 1 else tokens.reshape(-1, 1, *tokens.shape[2:])


def rows_by_lane(rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return `(B, ...)` for each row of the table, `(B * lanes, ...)`."""
    return rows.repeat_interleave(lanes, dim=0)
