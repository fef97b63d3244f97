"""Rows of the host's memory for pages that are not in fast memory."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ..pages.pool_growth import MAX_FREE
from .tier_limits import LayerTiers
from .transfers import Transfers

#: Memory is allocated in slabs of an eighth of what is used, at least so many rows and at most so many bytes.
MIN_SLAB_ROWS = 16
MAX_SLAB_BYTES = 1 << 20


class HostMemory:
    """A row of bytes for each page, in slabs that are freed when they are empty.

    Parameters
    ----------
    row_bytes : int
        Of a page.
    tiers : LayerTiers
        What the layer may take.
    transfers : Transfers
        Which kind of memory copies want.
    """

    def __init__(self, row_bytes: int, tiers: LayerTiers, transfers: Transfers) -> None:
        self.row_bytes = row_bytes
        self._tiers, self._transfers = tiers, transfers
        self._slabs: dict[int, torch.Tensor] = {}
        self._free: dict[int, list[int]] = {}
        self._row_of: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._next = 0

    def __contains__(self, page: int) -> bool:
        return page in self._row_of

    @property
    def pages(self) -> np.ndarray:
        """`(n,)` int64, the pages that have a row, the one that was not asked for longest first."""
        return np.fromiter(self._row_of, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes taken, free rows included."""
        return sum(slab.numel() for slab in self._slabs.values())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the rows."""
        return list(self._slabs.values())

    def free_rows(self) -> int:
        """Return how many rows can be allocated, those of memory that may still be taken included."""
        return sum(map(len, self._free.values())) + self._tiers.room("cpu") // self.row_bytes

    def allocate(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """Give each page a row and return the rows, `(row_bytes,)` uint8 each."""
        for page in pages:
            slab = next((slab for slab, free in self._free.items() if free), None)
            if slab is None:
                slab = self._new_slab()
            self._row_of[page] = slab, self._free[slab].pop()
        return [self.row(page) for page in pages]

    def _new_slab(self) -> int:
        rows = max(1, min(self._slab_rows(), self._tiers.room("cpu") // self.row_bytes))
        self._next += 1
        self._slabs[self._next] = self._transfers.host(rows, self.row_bytes)
        self._free[self._next] = list(range(rows))
        return self._next

    def _slab_rows(self) -> int:
        """Return the rows of the next slab, but for limits."""
        return max(MIN_SLAB_ROWS, min(len(self._row_of) // 8, MAX_SLAB_BYTES // self.row_bytes))

    def row(self, page: int) -> torch.Tensor:
        """Return the row of a page."""
        slab, row = self._row_of[page]
        return self._slabs[slab][row]

    def touch(self, page: int) -> None:
        """Note that a page was asked for."""
        self._row_of.move_to_end(page)

    def renumber(self, number: Mapping[int, int]) -> None:
        """Follow pages to other numbers, by old one; others keep theirs."""
        self._row_of = OrderedDict((number.get(page, page), where) for page, where in self._row_of.items())

    def give_back(self) -> None:
        """Move rows together where more memory is free than a slab and a fifth of what is used.

        So moving them costs at most five page copies for each row that has been freed.
        """
        free, used = sum(map(len, self._free.values())), len(self._row_of)
        if free <= self._slab_rows() + used * MAX_FREE:
            return
        self._transfers.finish()
        while self._slabs:
            # The emptiest goes first, as long as what it has fits into the others.
            slab = max(self._slabs, key=lambda each: len(self._free[each]))
            pages = [page for page, (own, _) in self._row_of.items() if own == slab]
            if len(pages) > free - len(self._free[slab]):
                return
            free -= len(self._slabs[slab])
            self._empty(slab, pages)

    def _empty(self, slab: int, pages: list[int]) -> None:
        """Move the rows of pages, all that a slab has, to free rows of others, and free the slab."""
        for page in pages:
            other = min((each for each, rows in self._free.items() if rows and each != slab), key=self._free_rows)
            row = self._free[other][-1]
            self._slabs[other][row].copy_(self.row(page))
            self._free[slab].append(self._row_of[page][1])
            self._row_of[page] = other, self._free[other].pop()
        del self._free[slab], self._slabs[slab]

    def _free_rows(self, slab: int) -> int:
        return len(self._free[slab])

    def drop(self, pages: Iterable[int]) -> None:
        """Free the rows of pages that have one."""
        for page in pages:
            if (found := self._row_of.pop(page, None)) is not None:
                slab, row = found
                self._free[slab].append(row)
                if len(self._free[slab]) == len(self._slabs[slab]):
                    del self._free[slab], self._slabs[slab]
