"""The bounds of packed keys, kept where they can be read when their pages cannot."""

from typing import Self

import torch

from ..common.tensors import resized
from ..pages.key_bounds import KeyBounds
from ..pages.types import PageIds


class CodeBounds(KeyBounds):
    """The floors and spreads of packed keys, which stay in fast memory when their pages leave it.

    They are what routing reads of a pool whose pages are all in fast memory, so that it chooses the same pages.

    Parameters
    ----------
    heads, dim : int
        Of the keys.
    device : torch.device
        Where attention runs.

    Attributes
    ----------
    ends, spreads : torch.Tensor
        `(H, N, D)` float16 floors and uint8 spreads.
    """

    def __init__(self, heads: int, dim: int, device: torch.device) -> None:
        super().__init__(heads, dim, torch.float16, device)
        self.ends = torch.zeros((heads, 0, dim), dtype=torch.float16, device=device)
        self.spreads = torch.zeros((heads, 0, dim), dtype=torch.uint8, device=device)

    @property
    def high(self) -> torch.Tensor:
        """`(H, N, D)` uint8 spreads above the floors."""
        return self.spreads

    def set(self, index: torch.Tensor, ids: PageIds, low: torch.Tensor, high: torch.Tensor) -> None:
        """Store floors and spreads `(H, n, D)` of pages, whose numbers `(n,)` are given on the device and the host."""
        self.ends.index_copy_(1, index, low)
        self.spreads.index_copy_(1, index, high)
        self.known[ids] = True

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self.ends, self.spreads]

    def resized(self, pages: int, kept: PageIds, index: torch.Tensor | int) -> Self:
        """Return the bounds of a pool of so many pages; see :meth:`KeyBounds.resized`."""
        new = super().resized(pages, kept, index)
        new.spreads = resized(self.spreads, pages, 1, index)
        return new

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the bounds of the page it is a copy of."""
        super().copy(page, new)
        self.spreads[:, new] = self.spreads[:, page]
