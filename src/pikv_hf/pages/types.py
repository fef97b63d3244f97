"""The type of page numbers, by which tables, pools and tiers name pages, and what a pool asks of those who know it."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

#: Numbers of pages in a pool, `(n,)` int64.
PageIds = npt.NDArray[np.int64]


class Droppable(Protocol):
    """What holds tensors of a pool, and makes itself anew, following the pool again, when it is next asked for."""

    def drop(self) -> None:
        """Let go of the tensors."""
