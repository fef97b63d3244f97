"""Where decoding steps write: a slot of each row, and those that follow it in its page."""

import torch

from ..kernels import expert_writer, newest_writer
from .plain_pool import PlainPool
from .types import PageIds


class RowSlots:
    """A slot of each of B rows, which are written one after the other as steps go on.

    What a step needs to know is worked out when a page begins, and anew where the pool has got other tensors: then the
    first call of a method puts what the kernels have made for these slots in its place.

    Parameters
    ----------
    pool : PlainPool
        Of the pages.
    slots : numpy.ndarray
        `(B,)` int64, the first slot of each row, `page * page_size + offset`.
    """

    def __init__(self, pool: PlainPool, slots: PageIds) -> None:
        self._pool, self._first = pool, pool.index(slots)

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
        pool.follow(self)
        vars(self)["write"] = newest_writer(pool.keys, pool.values, pool.positions, self._first)
        self.write(offset, keys, values, position)

    def write_experts(self, offset: int, experts: torch.Tensor) -> None:
        """Note the primary experts of tokens: `(B,)`, or one for each of as many rows that follow each other."""
        self._pool.follow(self)
        vars(self)["write_experts"] = expert_writer(self._pool.experts, self._first)
        self.write_experts(offset, experts)

    def empty(self, offset: int) -> None:
        """Take back the tokens of slots; the caller has counted them."""
        self._pool.positions.view(-1)[offset:].index_fill_(0, self._first, -1)

    def drop(self) -> None:
        """Let go of the pool's tensors, which are about to be replaced."""
        for name in ("write", "write_experts"):
            vars(self).pop(name, None)
