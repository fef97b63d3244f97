"""PiKV's scheduling policy: attention, recency and reuse distance in one utility."""

import dataclasses

import numpy as np

from .base import POLICIES, SchedulingPolicy, check_range
from .page_stats import Floats, Integers, PageStats, expected_distance, recent_shares


@POLICIES.register("pikv")
@dataclasses.dataclass
class PiKV(SchedulingPolicy):
    """PiKV's utility (arXiv 2508.06526): attention mass, recency and reuse distance, with a threshold that adapts.

    The utility is the mean, by the weights, of three terms in [0, 1]: mass `share / (share + mean share)` of
    :func:`recent_shares`, so 1/2 for a page with as much recent attention as the average one; recency
    `2^(-(step - last_use) / half_life)`; and reuse `1 / (1 + d / half_life)`, d of :func:`expected_distance`.

    Weights and half-life are those with the highest hit rate minus attention lost on recorded traces, against each term
    alone, pairs, other ratios and half-lives from 4 to 64: `options` in `eval/results/page-traces.json`. Its tables
    compare policies on other samples.

    Under a budget, where no page returns, a cache takes other options
    (:data:`pikv_hf.scheduling.page_scheduler.BUDGET_OPTIONS`): a longer half-life, and a fourth term, the rank of a
    page among the others by the upper bound of recent queries' logits (Quest's, arXiv 2406.10774), as the share of them
    with a lower one. The attention that a page gets says little of a fact that was read once and is asked for much
    later; that its keys stand out does. See `eval/results/budgets.json`.

    Pages below the threshold are surplus: what tiers may demote before they must. Misses mean that pages left too
    early, so a hit rate below the target lowers the threshold, and with it the pressure to evict; one above it raises
    it. (The published feedback has the sign the other way round.)

    Parameters
    ----------
    mass_weight, recency_weight, reuse_weight, bound_weight : float
        At least 0, not all 0; only their ratios matter. Where no bounds are known, the last does not count.
    half_life : float
        Steps, above 0: after as many without a use, recency and, at that distance, reuse are worth half.
    threshold : float
        Utility below which a page is surplus, in [0, 1], to begin with.
    target_hit_rate : float
        Hit rate, in [0, 1], at which the threshold stays.
    rate : float
        How far the threshold moves per unit of difference between hit rate and target, in one :meth:`count_reads`.
    """

    mass_weight: float = 6.0
    recency_weight: float = 5.0
    reuse_weight: float = 2.0
    half_life: float = 8.0
    threshold: float = 0.1
    target_hit_rate: float = 0.9
    rate: float = 0.05
    bound_weight: float = 0.0

    def __post_init__(self) -> None:
        for option in ("threshold", "target_hit_rate", "rate"):
            check_range(self, option, 0, 1)
        weights = self.mass_weight, self.recency_weight, self.reuse_weight, self.bound_weight
        if not (all(0 <= weight < np.inf for weight in weights) and any(weights)):
            raise ValueError(f"weights of scheduler 'pikv' must be finite, at least 0 and not all 0, got {weights}")
        if not 0 < self.half_life < np.inf:
            raise ValueError(f"half_life of scheduler 'pikv' must be above 0 and finite, got {self.half_life}")

    @property
    def reads_bounds(self) -> bool:
        """Whether it reads :attr:`PageStats.bounds` with the options that it has."""
        return self.bound_weight > 0

    def priority(self, view: PageStats) -> Floats:
        return self.utility(view)

    def utility(self, view: PageStats) -> Floats:
        """Return the utility of each page, `(n,)` float64 in [0, 1]."""
        shares, mean = recent_shares(view)
        mass = shares / (shares + (mean or 1.0))
        recency = np.exp2((view.last_use - view.step) / self.half_life)
        reuse = 1 / (1 + expected_distance(view) / self.half_life)
        terms = [(self.mass_weight, mass), (self.recency_weight, recency), (self.reuse_weight, reuse)]
        if view.bounds is not None:
            lower = np.searchsorted(np.sort(view.bounds), view.bounds)
            terms.append((self.bound_weight, lower / max(len(view) - 1, 1)))
        total = np.zeros(len(view))
        for weight, term in terms:
            total += weight * term
        # All of nothing where only bounds have a weight, and none are known.
        return total / (sum(weight for weight, _ in terms) or 1.0)

    def surplus(self, view: PageStats) -> Integers:
        """Return the indices of pages whose utility is below the threshold, the least useful first, int64."""
        utility = self.utility(view)
        order = np.lexsort((view.newest, utility))
        return order[utility[order] < self.threshold].astype(np.int64)

    def count_reads(self, hits: int, misses: int) -> None:
        """Move the threshold, within [0, 1]: down after a low hit rate, up after a high one."""
        if hits + misses:
            step = self.rate * (hits / (hits + misses) - self.target_hit_rate)
            self.threshold = min(max(self.threshold + step, 0.0), 1.0)
