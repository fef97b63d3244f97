"""Where decoding steps write: a slot of each row, and those that follow it in its page."""

from collections.abc import Callable
from typing import Protocol

import torch

from ..kernels import expert_writer, newest_writer
from .types import Droppable, PageIds


class WrittenPool(Protocol):
    """A :class:`.plain_pool.PlainPool`, of which slots are."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    experts: torch.Tensor

    def index(self, ids: PageIds) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pool's device."""

    def follow(self, reader: Droppable) -> None:
        """Drop what others know of the pool's tensors before these are replaced."""


class RowSlots:
    """A slot of each of B rows, which are written one after the other as steps go on.

    What a step needs to know is worked out when a page begins, and anew where the pool has got other tensors.

    Parameters
    ----------
    pool : PlainPool
        Of the pages.
    slots : numpy.ndarray
        `(B,)` int64, the first slot of each row, `page * page_size + offset`.
    """

    def __init__(self, pool: WrittenPool, slots: PageIds) -> None:
        self._pool, self._first = pool, pool.index(slots)
        self._write: Callable[[int, torch.Tensor, torch.Tensor, int], None] | None = None
        self._write_experts: Callable[[int, torch.Tensor], None] | None = None
        pool.follow(self)

    def write(self, offset: int, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Store one decoded token per row, `offset` slots behind the first, their experts yet unknown.

        Parameters
        ----------
        offset : int
            Not beyond the page.
        keys, values : torch.Tensor
            `(B, H, 1, D)` and `(B, H, 1, Dv)`.
        position : int
            Of all of them.
        """
        pool = self._pool
        if self._write is None:
            self._write = newest_writer(pool.keys, pool.values, pool.positions, self._first)
        self._write(offset, keys, values, position)

    def write_experts(self, offset: int, experts: torch.Tensor) -> None:
        """Note the primary experts of tokens: `(B,)`, or one for each of as many rows that follow each other."""
        if self._write_experts is None:
            self._write_experts = expert_writer(self._pool.experts, self._first)
        self._write_experts(offset, experts)

    def empty(self, offset: int) -> None:
        """Take back the tokens of slots; the caller has counted them."""
        self._pool.positions.view(-1)[offset:].index_fill_(0, self._first, -1)

    def drop(self) -> None:
        """Let go of the pool's tensors, which are about to be replaced."""
        self._write = self._write_experts = None
