"""The least and largest value of each key channel of a page: what routing knows of a page without reading it."""

import copy
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from ..common.kv import KV
from ..common.tensors import resized
from ..kernels.page_codes import spread_values
from .types import PageIds

#: Tokens are read in blocks of this many bytes to find their bounds.
BOUNDS_BLOCK_BYTES = 32 << 20


class BoundedPages(Protocol):
    """Pages whose tokens are read to find their bounds."""

    page_size: int
    positions: torch.Tensor

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""

    def index(self, ids: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pages' device."""

    def decoded(self, index: torch.Tensor, which: KV) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)`, `(H, n * P, D)`."""


class KeyBounds:
    """The bounds of the keys of a pool's pages, found when first asked for: the index of Quest (arXiv 2406.10774).

    Parameters
    ----------
    heads, dim : int
        Of the keys.
    dtype, device
        Of the keys: a bound is one of their values, so that it costs no precision.
    parts : tuple of KV
        What the channels of the keys are stored as: in latent attention, rotary parts of keys are stored as values.

    Attributes
    ----------
    parts : tuple of KV
        As given.
    ends : torch.Tensor
        `(H, N, 2 * D)`, the least values, then the largest.
    known : numpy.ndarray
        `(N,)` bool, the pages whose bounds have been found.
    """

    def __init__(
        self, heads: int, dim: int, dtype: torch.dtype, device: torch.device, parts: tuple[KV, ...] = (KV.KEYS,)
    ) -> None:
        self.dim, self.parts = dim, parts
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

    def find(
        self,
        pages: BoundedPages,
        ids: PageIds,
        read: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Have the bounds of pages `(n,)`, read where unknown: by `read` as :func:`read_bounds` does, or by that."""
        missing = self.missing(ids)
        step = max(1, BOUNDS_BLOCK_BYTES // max(1, pages.page_bytes))
        for start in range(0, len(missing), step):
            block = missing[start : start + step]
            index = pages.index(block)
            self.set(index, block, *(read_bounds(pages, index, self.parts) if read is None else read(index)))

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


def read_bounds(pages: BoundedPages, index: torch.Tensor, parts: tuple[KV, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of what is stored in pages `(n,)`, `(H, n, D)` each; slots without a token do not count."""
    keys, empty = stored_keys(pages, index, parts)
    return keys.masked_fill(empty, torch.inf).amin(dim=2), keys.masked_fill(empty, -torch.inf).amax(dim=2)


def stored_keys(pages: BoundedPages, index: torch.Tensor, parts: tuple[KV, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of pages `(n,)`, `(H, n, P, D)`, and which slots hold no token, `(n, P, 1)` bool."""
    stored = [pages.decoded(index, which) for which in parts]
    keys = (stored[0] if len(stored) == 1 else torch.cat(stored, dim=-1)).unflatten(1, (len(index), pages.page_size))
    return keys, (pages.positions[index] < 0)[..., None]


def beside_rotary(low: torch.Tensor, spread: torch.Tensor, rotary: KeyBounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of keys whose codes tell those of their latents: float32, the rotary parts behind these.

    `low` and `spread` are `(H, N, R)`, the floors and the uint8 spreads above them.
    """
    least = low.float()
    most = least + spread_values(spread)
    return torch.cat([least, rotary.low.float()], dim=-1), torch.cat([most, rotary.high.float()], dim=-1)
