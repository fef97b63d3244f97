"""The statistics of pages that scheduling policies compare, and what follows from them."""

import dataclasses
import math
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pages.usage_counters import ATTENTION_HALF_LIFE

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class PageStats:
    """Statistics of the n pages that may go; each array is `(n,)`, one entry per page.

    Attributes
    ----------
    step : int
        Attention steps so far; a decoded token or a chunk of tokens counts as one.
    born : numpy.ndarray
        int64, the step in which the page was filled.
    newest : numpy.ndarray
        int64, the newest position among its tokens.
    tokens : numpy.ndarray
        int64, how many tokens it holds.
    mass : numpy.ndarray
        float64, its share of the attention (mean over query heads), summed over the steps since it was filled.
    recent : numpy.ndarray
        float64, the same where a share counts half for every :data:`ATTENTION_HALF_LIFE` steps that have passed since.
    last_use : numpy.ndarray
        int64, the step of its last use; `born` if it was never used.
    previous_use : numpy.ndarray
        int64, the step of the use before that; -1 if there were fewer than two.
    uses : numpy.ndarray
        int64, in how many steps it was used.
    lane : numpy.ndarray
        int64, which (sequence, KV head) it belongs to; all 0 where pages hold all heads of one row.
    bounds : numpy.ndarray, optional
        float64, upper bound of the logits of recent queries, for policies with `wants_bounds`.
    """

    step: int
    born: Integers
    newest: Integers
    tokens: Integers
    mass: Floats
    recent: Floats
    last_use: Integers
    previous_use: Integers
    uses: Integers
    lane: Integers
    bounds: Floats | None = None

    def __len__(self) -> int:
        return len(self.born)


_DECAY = 0.5 ** (1 / ATTENTION_HALF_LIFE)
_GROWTH = accumulate(repeat(1.0, 64 * ATTENTION_HALF_LIFE), lambda kept, share: kept * _DECAY + share)
#: :attr:`PageStats.recent` of a page that took all attention in each of 1, 2, ... steps; in the end it stays.
_ALL_RECENT = np.fromiter(_GROWTH, np.float64)


def mean_shares(view: PageStats) -> tuple[Floats, float]:
    """Return the mean share of the attention that each page had per step since it was filled, and the mean of pages.

    Sums say more about age than about attention: a page that was just filled has none, so that it would always go
    first, and what was filled first would stay. Pages that no step has seen count as the mean of the others.

    Returns
    -------
    shares, mean : numpy.ndarray, float
        `(n,)` float64, and the mean over pages that were seen, 0 if none was.
    """
    return _per_step(view, view.mass, np.maximum(view.step - view.born, 1))


def recent_shares(view: PageStats) -> tuple[Floats, float]:
    """Return the same as :func:`mean_shares` with each share halved per :data:`ATTENTION_HALF_LIFE` steps since."""
    age = np.clip(view.step - view.born, 1, len(_ALL_RECENT))
    return _per_step(view, view.recent, _ALL_RECENT[age - 1])


def _per_step(view: PageStats, total: Floats, weight: npt.NDArray[Any]) -> tuple[Floats, float]:
    seen = view.step > view.born
    shares = total / weight
    # Rounded once, whatever the order of the pages.
    mean = math.fsum(shares[seen].tolist()) / max(int(seen.sum()), 1)
    return np.where(seen, shares, mean), mean


def expected_distance(view: PageStats) -> Integers:
    """Return how many steps after its last use a page is expected to be used again, `(n,)` int64.

    As far apart as the last two uses were, or as long as the page has been waiting if that is longer; without two uses,
    as old as the page is.
    """
    distance = np.maximum(view.last_use - view.previous_use, view.step - view.last_use)
    return np.where(view.previous_use < 0, view.step - view.born, distance)
