"""Full pages taken out of a pool: their tokens and their shards."""

import dataclasses

import numpy as np
import torch

from .tokens import TokenBatch


@dataclasses.dataclass(frozen=True, slots=True)
class PageContents:
    """The contents of n full pages.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(H, n, P, D)` and `(H, n, P, Dv)`.
    positions, experts : torch.Tensor
        `(n, P)` int32 and int16.
    shards : numpy.ndarray
        `(n,)`, the shard of each page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    experts: torch.Tensor
    shards: np.ndarray

    @classmethod
    def from_tokens(cls, tokens: TokenBatch, shards: np.ndarray) -> "PageContents":
        """Return n pages of `(n * P)` tokens, one page after another."""
        shape = len(shards), len(tokens) // len(shards)
        keys, values = tokens.keys.unflatten(1, shape), tokens.values.unflatten(1, shape)
        return cls(keys, values, tokens.positions.view(shape), tokens.experts.view(shape), shards)

    def tokens(self) -> TokenBatch:
        """Return the tokens of the pages, one page after another."""
        keys, values = self.keys.flatten(1, 2), self.values.flatten(1, 2)
        return TokenBatch(keys, values, self.positions.view(-1), self.experts.view(-1))

    def pick(self, which: np.ndarray) -> "PageContents":
        """Return copies of the pages at `which` `(m,)`."""
        index = torch.from_numpy(which).to(self.positions.device)
        keys, values = self.keys.index_select(1, index), self.values.index_select(1, index)
        return PageContents(keys, values, self.positions[index], self.experts[index], self.shards[which])
