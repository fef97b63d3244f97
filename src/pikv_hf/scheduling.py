"""Scheduling: which full pages go first, evicted or demoted to a slower tier, when a budget is exceeded.

A policy sees statistics of the pages that may go (sinks, recent window and pages that are not full never do) and gives
each a priority; the lowest goes first. Statistics come from the attention masses that the kernels return. A page "is
used" in a step when it takes at least its equal share of the attention: one over the number of pages read.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate, repeat
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from pikv_hf.suggest import did_you_mean

#: Steps after which attention counts half in :attr:`PageView.recent`.
HALF_LIFE = 64

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class PageView:
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
        float64, the same where a share counts half for every :data:`HALF_LIFE` steps that have passed since.
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


class SchedulingPolicy(ABC):
    """Says which pages go first.

    Attributes
    ----------
    name : str
        What :func:`make_policy` knows it by.
    per_head : bool
        Whether every KV head should have pages of its own, so that heads may keep different pages.
    wants_bounds : bool
        Whether it reads :attr:`PageView.bounds`; see :attr:`reads_bounds`.
    """

    name: ClassVar[str]
    per_head: ClassVar[bool] = False
    wants_bounds: ClassVar[bool] = False

    @property
    def reads_bounds(self) -> bool:
        """Whether it reads :attr:`PageView.bounds` with the options that it has."""
        return self.wants_bounds

    @abstractmethod
    def priority(self, view: PageView) -> Floats:
        """Return `(n,)` float64, finite or +inf; the page with the lowest goes first, of equal ones the oldest."""

    def observe(self, hits: int, misses: int) -> None:  # noqa: B027 (most policies do not care)
        """Learn how many of the pages asked for were in fast memory, and how many were not."""


def leaving(policy: SchedulingPolicy, view: PageView, tokens: int) -> Integers:
    """Return the fewest pages, in the order in which `policy` lets them go, that hold at least `tokens` tokens.

    Parameters
    ----------
    policy : SchedulingPolicy
        Whose lowest priorities go first; of equal ones the page with the oldest `newest`.
    view : PageView
        Of n pages.
    tokens : int
        How many tokens have to go. If the pages hold fewer, all of them go.

    Returns
    -------
    numpy.ndarray
        Indices into the view, int64.

    Raises
    ------
    ValueError
        If the policy returns another shape than `(n,)`.
    """
    if tokens <= 0 or not len(view):
        return np.empty(0, np.int64)
    priority = policy.priority(view)
    if priority.shape != view.born.shape:
        raise ValueError(f"policy {policy.name!r} gave priorities of shape {priority.shape} for {len(view)} pages")
    order = np.lexsort((view.newest, priority))
    held = np.cumsum(view.tokens[order])
    return order[: int(np.searchsorted(held, tokens)) + 1].astype(np.int64)


POLICIES: dict[str, type[SchedulingPolicy]] = {}
_Policy = TypeVar("_Policy", bound=type[SchedulingPolicy])


def register(name: str) -> Callable[[_Policy], _Policy]:
    """Make a policy, a dataclass of its options, known to :func:`make_policy`."""

    def add(policy: _Policy) -> _Policy:
        policy.name = name
        POLICIES[name] = policy
        return policy

    return add


def make_policy(name: str, **options: Any) -> SchedulingPolicy:
    """Return a policy by name.

    Parameters
    ----------
    name : str
        One of :data:`POLICIES`.
    **options
        Fields of the policy's class.

    Raises
    ------
    ValueError
        If there is no such policy, or a value is out of range.
    TypeError
        If the policy has no such option.
    """
    if name not in POLICIES:
        raise ValueError(f"scheduler must be one of {', '.join(POLICIES)}, got {name!r}{did_you_mean(name, POLICIES)}")
    known = [field.name for field in dataclasses.fields(POLICIES[name]) if field.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise TypeError(f"scheduler {name!r} has no option {option!r}{did_you_mean(option, known)}; {has}")
    return POLICIES[name](**options)


def _check_range(policy: SchedulingPolicy, option: str, low: float, high: float) -> None:
    value = getattr(policy, option)
    if not low <= value <= high:
        raise ValueError(f"{option} of scheduler {policy.name!r} must be in [{low:g}, {high:g}], got {value}")


_DECAY = 0.5 ** (1 / HALF_LIFE)
_GROWTH = accumulate(repeat(1.0, 64 * HALF_LIFE), lambda kept, share: kept * _DECAY + share)
#: :attr:`PageView.recent` of a page that took all attention in each of 1, 2, ... steps; it grows no further at the end.
_ALL_RECENT = np.fromiter(_GROWTH, np.float64)


def mean_shares(view: PageView) -> tuple[Floats, float]:
    """Return the mean share of the attention that each page had per step since it was filled, and the mean of pages.

    Sums say more about age than about attention: a page that was just filled has none, so that it would always go
    first, and what was filled first would stay. Pages that no step has seen count as the mean of the others.

    Returns
    -------
    shares, mean : numpy.ndarray, float
        `(n,)` float64, and the mean over pages that were seen, 0 if none was.
    """
    return _per_step(view, view.mass, np.maximum(view.step - view.born, 1))


def recent_shares(view: PageView) -> tuple[Floats, float]:
    """Return the same as :func:`mean_shares` where a share counts half for every :data:`HALF_LIFE` steps since."""
    age = np.clip(view.step - view.born, 1, len(_ALL_RECENT))
    return _per_step(view, view.recent, _ALL_RECENT[age - 1])


def _per_step(view: PageView, total: Floats, weight: npt.NDArray[Any]) -> tuple[Floats, float]:
    seen = view.step > view.born
    shares = total / weight
    # Rounded once, whatever the order of the pages.
    mean = math.fsum(shares[seen].tolist()) / max(int(seen.sum()), 1)
    return np.where(seen, shares, mean), mean


def expected_distance(view: PageView) -> Integers:
    """Return how many steps after its last use a page is expected to be used again, `(n,)` int64.

    As far apart as the last two uses were, or as long as the page has been waiting if that is longer; without two uses,
    as old as the page is.
    """
    distance = np.maximum(view.last_use - view.previous_use, view.step - view.last_use)
    return np.where(view.previous_use < 0, view.step - view.born, distance)


@register("streaming_llm")
@dataclasses.dataclass
class StreamingLLM(SchedulingPolicy):
    """Oldest positions first: what remains are sinks and the newest tokens (arXiv 2309.17453)."""

    def priority(self, view: PageView) -> Floats:
        return view.newest.astype(np.float64)


@register("h2o")
@dataclasses.dataclass
class H2O(SchedulingPolicy):
    """Least accumulated attention first (arXiv 2306.14048), by page where the paper has tokens.

    Parameters
    ----------
    per_step : bool
        Compare means per step (:func:`mean_shares`). The paper's sums, False, let every new page go at once here, where
        pages are counted from when they left the window: with a quarter of the pages of 2,048 tokens, 47% of the
        attention was lost instead of 36% (`eval/results/page-traces.json`).
    """

    per_step: bool = True

    def priority(self, view: PageView) -> Floats:
        return mean_shares(view)[0] if self.per_step else view.mass


@register("lru")
@dataclasses.dataclass
class LRU(SchedulingPolicy):
    """Least recently used first; being filled counts as a use.

    Where no use is recorded this is first in, first out: a circular buffer of the budget's size.
    """

    def priority(self, view: PageView) -> Floats:
        return view.last_use.astype(np.float64)


@register("lru_plus")
@dataclasses.dataclass
class LRUPlus(SchedulingPolicy):
    """LRU in which pages used often and heavily age more slowly.

    The priority is minus the steps since the last use (plus one), divided by `(1 + uses) (1 + share / largest share)`
    of :func:`mean_shares`. The name is PiKV's (arXiv 2508.06526); the formula is this project's.
    """

    def priority(self, view: PageView) -> Floats:
        shares, _ = mean_shares(view)
        weight = 1 + shares / (shares.max(initial=0.0) or 1.0)
        return -(view.step - view.last_use + 1) / ((1 + view.uses) * weight)


@register("quest")
@dataclasses.dataclass
class Quest(SchedulingPolicy):
    """Lowest upper bound of recent queries' logits first; without bounds, least recent attention first.

    The bound is the one by which Quest (arXiv 2406.10774) chooses what to read; it evicts nothing. Recent attention is
    that of :func:`recent_shares`.
    """

    wants_bounds: ClassVar[bool] = True

    def priority(self, view: PageView) -> Floats:
        return recent_shares(view)[0] if view.bounds is None else view.bounds


@register("ada_kv")
@dataclasses.dataclass
class AdaKV(SchedulingPolicy):
    """KV heads compete for one budget by attention; each is sure of a part of its equal share (arXiv 2407.11550).

    What competes is each page's part of the attention that its lane's pages get (:func:`mean_shares`). A view should
    hold the pages of one sequence. The equal share is that of its pages: of a page or so more than remain
    while decoding, of more where a long prompt is cut down at once. Safeguarded pages go after all others.

    Parameters
    ----------
    alpha : float
        Share of the pages of an equal division that the heaviest pages of every lane are safe in.
    """

    per_head: ClassVar[bool] = True
    alpha: float = 0.2

    def __post_init__(self) -> None:
        _check_range(self, "alpha", 0, 1)

    def priority(self, view: PageView) -> Floats:
        _, lane = np.unique(view.lane, return_inverse=True)
        lanes = int(lane.max(initial=0)) + 1
        shares, _ = mean_shares(view)
        total = np.bincount(lane, shares, lanes)[lane]
        part = np.divide(shares, total, out=np.zeros(len(view)), where=total > 0)
        safe = _rank_in_lane(lane, -part, -view.newest) < int(self.alpha * len(view) / lanes)
        return np.where(safe, 2.0 + part, part)


def _rank_in_lane(lane: Integers, *keys: npt.NDArray[Any]) -> Integers:
    """Return the rank of each page within its lane, by the first key, then the next."""
    order = np.lexsort((*reversed(keys), lane))
    ordered = lane[order]
    rank = np.empty(len(lane), np.int64)
    rank[order] = np.arange(len(lane)) - np.searchsorted(ordered, ordered)
    return rank


@register("duo")
@dataclasses.dataclass
class Duo(SchedulingPolicy):
    """Pages of streaming heads first, oldest first; then those of retrieval heads, least recently used first.

    DuoAttention (arXiv 2410.10819) trains a gate per head. Nothing is trained here: a lane is a streaming head while
    its pages, which leave out sinks, window and unfilled pages, take little of its attention, on average over the
    steps since its oldest page was filled.

    Parameters
    ----------
    little : float
        Share of a lane's attention below which it is a streaming head.
    """

    per_head: ClassVar[bool] = True
    little: float = 0.1

    def __post_init__(self) -> None:
        _check_range(self, "little", 0, 1)

    def priority(self, view: PageView) -> Floats:
        _, lane = np.unique(view.lane, return_inverse=True)
        oldest = np.full(lane.max(initial=0) + 1, view.step)
        np.minimum.at(oldest, lane, view.born)
        outside = np.bincount(lane, view.mass, len(oldest)) / np.maximum(view.step - oldest, 1)
        after = view.newest.max(initial=0) + 1
        streaming = (outside < self.little)[lane]
        return np.where(streaming, view.newest, after + view.last_use).astype(np.float64)


@register("two_queue")
@dataclasses.dataclass
class TwoQueue(SchedulingPolicy):
    """2Q (Johnson and Shasha, VLDB 1994): pages used at most once wait in a FIFO, others in an LRU queue.

    While the FIFO has more than its share of the pages, its oldest go; then the least recently used of the others.
    Evicted pages do not return, so the ghost queue of 2Q has no counterpart: a second use is what promotes a page.

    Parameters
    ----------
    first_share : float
        Share of the pages that may be in the FIFO.
    """

    first_share: float = 0.25

    def __post_init__(self) -> None:
        _check_range(self, "first_share", 0, 1)

    def priority(self, view: PageView) -> Floats:
        n, often = len(view), view.uses >= 2
        order = np.lexsort((view.newest, np.where(often, view.last_use, view.born), often))
        first = n - int(often.sum())
        over = max(first - int(self.first_share * n), 0)
        place = np.empty(n, np.float64)
        # The FIFO's surplus, then the LRU queue, then the rest of the FIFO.
        place[np.concatenate([order[:over], order[first:], order[over:first]])] = np.arange(n)
        return place


@register("reuse_distance")
@dataclasses.dataclass
class ReuseDistance(SchedulingPolicy):
    """Longest expected distance to the next use first (:func:`expected_distance`): Belady's rule on a prediction."""

    def priority(self, view: PageView) -> Floats:
        return -expected_distance(view).astype(np.float64)


@register("pikv")
@dataclasses.dataclass
class PiKV(SchedulingPolicy):
    """PiKV's utility (arXiv 2508.06526): attention mass, recency and reuse distance, with a threshold that adapts.

    The utility is the mean, by the weights, of three terms in [0, 1]: mass `share / (share + mean share)` of
    :func:`recent_shares`, so 1/2 for a page with as much recent attention as the average one; recency
    `2^(-(step - last_use) / half_life)`; and reuse `1 / (1 + d / half_life)`, d of :func:`expected_distance`.

    Weights and half-life are those with the highest hit rate minus attention lost on recorded traces, against each term
    alone, pairs, other ratios and half-lives from 4 to 64: `options` in `eval/results/page-traces.json`. Its tables
    compare policies on other samples.

    Under a budget, where no page returns, a cache takes other options (:data:`pikv_hf.schedule.BUDGET_OPTIONS`): a
    longer half-life, and a fourth term, the rank of a page among the others by the upper bound of recent queries'
    logits (Quest's, arXiv 2406.10774), as the share of them with a lower one. The attention that a page gets says
    little of a fact that was read once and is asked for much later; that its keys stand out does. See
    `eval/results/budgets.json`.

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
        How far the threshold moves per unit of difference between hit rate and target, in one :meth:`observe`.
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
            _check_range(self, option, 0, 1)
        weights = self.mass_weight, self.recency_weight, self.reuse_weight, self.bound_weight
        if not (all(0 <= weight < np.inf for weight in weights) and any(weights)):
            raise ValueError(f"weights of scheduler 'pikv' must be finite, at least 0 and not all 0, got {weights}")
        if not 0 < self.half_life < np.inf:
            raise ValueError(f"half_life of scheduler 'pikv' must be above 0 and finite, got {self.half_life}")

    @property
    def reads_bounds(self) -> bool:
        """Whether it reads :attr:`PageView.bounds` with the options that it has."""
        return self.bound_weight > 0

    def priority(self, view: PageView) -> Floats:
        return self.utility(view)

    def utility(self, view: PageView) -> Floats:
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

    def surplus(self, view: PageView) -> Integers:
        """Return the indices of pages whose utility is below the threshold, the least useful first, int64."""
        utility = self.utility(view)
        order = np.lexsort((view.newest, utility))
        return order[utility[order] < self.threshold].astype(np.int64)

    def observe(self, hits: int, misses: int) -> None:
        """Move the threshold, within [0, 1]: down after a low hit rate, up after a high one."""
        if hits + misses:
            step = self.rate * (hits / (hits + misses) - self.target_hit_rate)
            self.threshold = min(max(self.threshold + step, 0.0), 1.0)
