"""The pool of pages that keep their tokens as they came."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from ..common.kv import KV
from ..kernels import append_tokens, gather_dense
from .key_bounds import KeyBounds
from .page_contents import PageContents
from .page_pool import PagePool
from .tokens import TokenBatch
from .types import PageIds

#: The share by which these pools grow.
PLAIN_GROWTH = 1 / 16


class PlainPool(PagePool):
    """Pages of one layer on one device, in the model's dtype.

    The K/V of slots beyond a page's count are finite, so that a masked slot never turns a sum into NaN.

    Parameters
    ----------
    num_heads, key_dim, value_dim : int
        KV heads and the head dims of keys and values, which may differ.
    page_size : int
        Tokens per page.
    dtype : torch.dtype
        Of keys and values.
    device : torch.device
        Where the pages live.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(H, N, P, D)` and `(H, N, P, Dv)`. Heads come first, so that neighbouring pages are one contiguous block per
        head and attention reads them without a copy.
    incompressible : numpy.ndarray
        `(N,)` bool, the full pages that were to be packed and that no codec could hold well enough.
    """

    new_page: ClassVar[Mapping[str, np.ndarray | np.generic]] = {**PagePool.new_page, "incompressible": np.bool_(False)}
    undone: ClassVar[tuple[str, ...]] = (*PagePool.undone, "incompressible")
    incompressible: np.ndarray

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(page_size, device, PLAIN_GROWTH)
        self.keys = torch.zeros((num_heads, 0, page_size, key_dim), dtype=dtype, device=device)
        self.values = torch.zeros((num_heads, 0, page_size, value_dim), dtype=dtype, device=device)

    def token_tensors(self) -> list[torch.Tensor]:
        """Return keys and values."""
        return [self.keys, self.values]

    def _replace_tokens(self, tensors: list[torch.Tensor]) -> None:
        self.keys, self.values = tensors

    def _new_bounds(self) -> KeyBounds:
        return KeyBounds(*self.key_shape, self.keys.dtype, self.device, self.key_parts)

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys, rotary parts included."""
        return self.keys.shape[0], self.keys.shape[-1] + (self.values.shape[-1] if self.rotary_values else 0)

    @property
    def bounds_dim(self) -> int:
        """Channels of the keys, rotary parts included."""
        return self.key_shape[1]

    def allocate(self, pages: int, after: int = -1, shard: int = -1, holders: int = 1) -> PageIds:
        """Take free pages; see :meth:`PagePool.allocate`."""
        ids = super().allocate(pages, after, shard, holders)
        self.incompressible[ids] = False
        return ids

    def write(self, slots: torch.Tensor, tokens: TokenBatch) -> None:
        """Store tokens; the caller has counted them.

        Parameters
        ----------
        slots : torch.Tensor
            `(n,)` int64, `page * page_size + offset`.
        tokens : TokenBatch
            n tokens of one sequence.
        """
        append_tokens(self.keys, slots, tokens.keys)
        append_tokens(self.values, slots, tokens.values)
        self.positions.view(-1).index_copy_(0, slots, tokens.positions)
        self.experts.view(-1).index_copy_(0, slots, tokens.experts)

    def move(self, sources: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy tokens from one set of slots to another, both `(n,)` int64."""
        every = TokenBatch(self.flat_keys, self.flat_values, self.positions.view(-1), self.experts.view(-1))
        self.write(slots, every.pick(sources))
        if self.usage is not None:
            pages = slots // self.page_size
            filled = (self.positions[pages] >= 0).sum(dim=1)
            self.usage.move_tokens(sources // self.page_size, pages, self.page_size, filled)

    @property
    def flat_keys(self) -> torch.Tensor:
        """`(H, N * P, D)` view of the keys, one row per slot."""
        return self.keys.view(self.keys.shape[0], -1, self.keys.shape[-1])

    @property
    def flat_values(self) -> torch.Tensor:
        """`(H, N * P, Dv)` view of the values, one row per slot."""
        return self.values.view(self.values.shape[0], -1, self.values.shape[-1])

    def contents(self, ids: PageIds) -> PageContents:
        """Return copies of full pages."""
        index = self.index(ids)
        keys, values = self.keys.index_select(1, index), self.values.index_select(1, index)
        return PageContents(keys, values, self.positions[index], self.experts[index], self.shard[ids])

    def insert(self, contents: PageContents) -> PageIds:
        """Store full pages of another pool; return their numbers `(n,)`, to which nobody refers yet."""
        ids = self.allocate(contents.keys.shape[1], holders=0)
        index = self.index(ids)
        self.keys.index_copy_(1, index, contents.keys)
        self.values.index_copy_(1, index, contents.values)
        self.positions[index], self.experts[index] = contents.positions, contents.experts
        self.count[ids], self.shard[ids] = self.page_size, contents.shards
        return ids

    def decoded(self, index: torch.Tensor, which: KV) -> torch.Tensor:
        """Return a copy of the keys, or the values, of the pages at `index` `(n,)`, `(H, n * P, D)`."""
        return (self.keys if which is KV.KEYS else self.values).index_select(1, index).flatten(1, 2)

    def gather(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the pages of a `(B, n)` table into `(H, B, n * P, D)` keys and values."""
        return gather_dense(self.keys, table), gather_dense(self.values, table)
