"""The least and largest value of each key channel of a page: what routing knows of a page without reading it."""

import copy
from typing import Self

import numpy as np
import torch

from ..common.tensors import resized
from .types import PageIds


class KeyBounds:
    """The bounds of the keys of a pool's pages, found when first asked for: the index of Quest (arXiv 2406.10774).

    Parameters
    ----------
    heads, dim : int
        Of the keys.
    dtype, device
        Of the keys: a bound is one of their values, so that it costs no precision.

    Attributes
    ----------
    ends : torch.Tensor
        `(H, N, 2 * D)`, the least values, then the largest.
    known : numpy.ndarray
        `(N,)` bool, the pages whose bounds have been found.
    """

    def __init__(self, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim = dim
        self.ends = torch.zeros((heads, 0, 2 * dim), dtype=dtype, device=device)
        self.known = np.zeros(0, dtype=np.bool_)

    @property
    def low(self) -> torch.Tensor:
        """`(H, N, D)` view of the least values."""
        return self.ends[..., : self.dim]

    @property
    def high(self) -> torch.Tensor:
        """`(H, N, D)` view of the largest values."""
        return self.ends[..., self.dim :]

    def missing(self, ids: PageIds) -> PageIds:
        """Return those of pages `(n,)` whose bounds are unknown, ascending, each once."""
        return np.unique(ids[~self.known[ids]])

    def set(self, index: torch.Tensor, ids: PageIds, low: torch.Tensor, high: torch.Tensor) -> None:
        """Store bounds `(H, n, D)` of pages, whose numbers `(n,)` are given on the device and on the host."""
        self.ends.index_copy_(1, index, torch.cat([low, high], dim=-1))
        self.known[ids] = True

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self.ends]

    @property
    def host_bytes(self) -> int:
        """Bytes kept outside of tensors."""
        return self.known.nbytes

    def resized(self, pages: int, kept: PageIds, index: torch.Tensor | int) -> Self:
        """Return the bounds of a pool of so many pages, of which the first are those `kept` `(n,)`.

        `index` are the same numbers on the device, or n if these are `0..n-1`.
        """
        new = copy.copy(self)
        new.ends = resized(self.ends, pages, 1, index)
        new.known = np.append(self.known[kept], np.zeros(pages - len(kept), dtype=np.bool_))
        return new

    def reset(self, ids: PageIds) -> None:
        """Forget the bounds of pages that get other tokens."""
        self.known[ids] = False

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the bounds of the page it is a copy of."""
        self.ends[:, new] = self.ends[:, page]
        self.known[new] = self.known[page]
