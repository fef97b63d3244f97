"""The tokens that travel from an attention layer into pages."""

import dataclasses

import torch

from ..common.tensors import to_device


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens with all that is stored of them: of one sequence, or of all rows of a table.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(H, n, D)` and `(H, n, Dv)`; of rows `(B, H, n, D)` and `(B, H, n, Dv)`.
    positions : torch.Tensor
        `(n,)` int32, the same for all rows.
    experts : torch.Tensor
        `(n,)` int16, of rows `(B, n)`: the token's primary expert, -1 where unknown.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    experts: torch.Tensor

    def __len__(self) -> int:
        """Return n, the tokens of a sequence, or of each row."""
        return self.positions.shape[0]

    def __getitem__(self, part: slice) -> "TokenBatch":
        """Return views of some of the tokens."""
        keys, values = self.keys[..., part, :], self.values[..., part, :]
        return TokenBatch(keys, values, self.positions[part], self.experts[..., part])

    def pick(self, index: torch.Tensor) -> "TokenBatch":
        """Return copies of the tokens at `index` `(m,)` int64."""
        keys, values = self.keys.index_select(-2, index), self.values.index_select(-2, index)
        return TokenBatch(keys, values, self.positions[index], self.experts[..., index])

    def row(self, row: int) -> "TokenBatch":
        """Return views of the tokens of one row."""
        return TokenBatch(self.keys[row], self.values[row], self.positions, self.experts[row])

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the tokens on a device, themselves if they are there."""
        parts = (self.keys, self.values, self.positions, self.experts)
        return TokenBatch(*(to_device(part, device) for part in parts))
