"""By how much pools of pages grow, and how many free pages they keep when others are given back."""

from typing import Any

#: A pool that runs out of pages grows by a share of its size, at least by this many pages.
MIN_GROWTH = 4

#: A pool has at most this share of its pages in use in free ones, once what freed them is over.
MAX_FREE = 1 / 5


class NoRoomError(Exception):
    """A :class:`PagePool` may not grow as far as it has to: so many of its pages have to go first."""

    def __init__(self, pool: Any, pages: int) -> None:
        super().__init__(f"{pages} pages too few of {pool.capacity}")
        self.pool, self.pages = pool, pages


def growth_of(pages: int, share: float) -> int:
    """Return by how many a pool of so many pages grows: the first reservation is exact, a prompt of known size."""
    return max(MIN_GROWTH, int(pages * share)) if pages else 0


def kept_free(used: int, free: int, rows: int, share: float) -> int:
    """Return how many free pages a pool keeps of those that it has: all, unless they are many.

    Many are more than a fifth of those in use, and more than two for each sequence (one that leaves the window, one
    that a draft had begun) beside what is kept then, which is what growth would bring. So pages that were copied
    together are not copied again before an eighth as many have become free, or two for each sequence: giving a page
    back costs at most eight page copies, and a sequence that goes forwards and backwards by less than a page, as in
    assisted decoding, causes none.

    Parameters
    ----------
    used, free : int
        Pages in use, and the others.
    rows : int
        Sequences that the pool has pages of.
    share : float
        By which it grows.
    """
    spare = growth_of(used, share)
    most = max(spare + 2 * rows, int(used * MAX_FREE)) if used else 0
    return spare if free > most else free
