"""Which pages of a pool leave fast memory first: those that a scheduling policy ranks lowest."""

import weakref
from typing import Protocol

import numpy as np

from ..pages.types import PageIds
from ..tiers.tiered_pool import TieredPool
from .eviction_candidates import stats_of
from .policies.registry import SchedulingPolicy


class PolicyClock(Protocol):
    """A policy, and the attention steps that its statistics count."""

    policy: SchedulingPolicy
    now: int


class TierPriority:
    """Ranks pages of a tiered pool as a layer's scheduler does; oldest reads go first once that is gone.

    Parameters
    ----------
    scheduler : PolicyClock
        The layer's scheduler.
    pool : TieredPool
        Whose pages.
    """

    def __init__(self, scheduler: PolicyClock, pool: TieredPool) -> None:
        # Neither keeps the other alive: files are removed with the pool.
        self._scheduler, self._pool = weakref.ref(scheduler), weakref.ref(pool)

    def __call__(self, pages: PageIds) -> np.ndarray:
        """Return the priority of pages `(n,)`, `(n,)`: the lowest leaves first."""
        scheduler, pool = self._scheduler(), self._pool()
        assert pool is not None
        if scheduler is None or pool.usage is None:
            return pool.frames.last_use[pages]
        return scheduler.policy.priority(stats_of(pool, pages, scheduler.now))
