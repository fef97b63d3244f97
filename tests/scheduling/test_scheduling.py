"""Scheduling policies against slow references on random traces, and what the cache relies on."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scheduling_reference as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.config import SCHEDULERS
from pikv_hf.pages.usage_counters import ATTENTION_HALF_LIFE
from pikv_hf.scheduling.policies.registry import (
    POLICIES,
    PageStats,
    PiKV,
    SchedulingPolicy,
    leaving,
    make_policy,
)

pytestmark = pytest.mark.slow

SHARES = (0.0, 0.0, 0.0625, 0.125, 0.25, 0.5)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in POLICIES),
    ("h2o", {"per_step": False}),
    ("ada_kv", {"alpha": 0.7}),
    ("ada_kv", {"alpha": 0.0}),
    ("duo", {"little": 0.4}),
    ("two_queue", {"first_share": 0.6}),
    ("pikv", {"mass_weight": 2.0, "recency_weight": 0.0, "reuse_weight": 3.0, "half_life": 3.0}),
    ("pikv", {"bound_weight": 7.0}),
]


class Usage:
    """Statistics of pages kept up to date step by step, as a cache keeps them, in the order of their page numbers."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            field.name: [] for field in dataclasses.fields(PageStats) if field.name not in ("step", "bounds")
        }
        self.numbers: list[int] = []

    def fill(self, number: int, step: int, newest: int, tokens: int, lane: int) -> None:
        self.numbers.append(number)
        values = {"born": step, "newest": newest, "tokens": tokens, "lane": lane, "last_use": step, "previous_use": -1}
        for name, column in self.columns.items():
            column.append(values.get(name, 0))

    def attend(self, step: int, shares: dict[int, float], read: int) -> None:
        for index, number in enumerate(self.numbers):
            share = shares.get(number, 0.0)
            self.columns["mass"][index] += share
            self.columns["recent"][index] = self.columns["recent"][index] * 0.5 ** (1 / ATTENTION_HALF_LIFE) + share
            if share * read >= 1:
                if self.columns["uses"][index]:
                    self.columns["previous_use"][index] = self.columns["last_use"][index]
                self.columns["last_use"][index] = step
                self.columns["uses"][index] += 1

    def view(self, step: int, bounds: list[float] | None = None) -> PageStats:
        floats = ("mass", "recent")
        arrays = {k: np.array(v, np.float64 if k in floats else np.int64) for k, v in self.columns.items()}
        return PageStats(step=step, bounds=None if bounds is None else np.array(bounds), **arrays)

    def drop(self, indices: np.ndarray) -> None:
        for index in sorted(indices.tolist(), reverse=True):
            for column in (self.numbers, *self.columns.values()):
                del column[index]


@dataclasses.dataclass
class Step:
    """What happens in a step: attention, then pages of some lanes fill, then tokens have to go."""

    shares: list[float]
    fills: list[tuple[int, int]]
    bounds: list[float] | None
    leave: int


@st.composite
def traces(draw: st.DrawFn) -> list[Step]:
    lanes = draw(st.integers(1, 3))
    steps = []
    for _ in range(draw(st.integers(1, 25))):
        fills = draw(st.lists(st.tuples(st.integers(0, lanes - 1), st.sampled_from((4, 4, 8))), max_size=3))
        shares = draw(st.lists(st.sampled_from(SHARES), min_size=24, max_size=24))
        bounds = draw(st.none() | st.lists(st.integers(-2, 2).map(float), min_size=24, max_size=24))
        steps.append(Step(shares, fills, bounds, draw(st.sampled_from((0, 0, 0, 1, 5, 20)))))
    return steps


def order(name: str, policy: SchedulingPolicy, pages: slow.Pages, now: int, options: dict[str, Any]) -> slow.Pages:
    if isinstance(policy, PiKV):
        terms = policy.mass_weight, policy.recency_weight, policy.reuse_weight, policy.half_life, policy.bound_weight
        return slow.pikv(pages, now, *terms)
    return slow.ORDERS[name](pages, now, **options)


def replay(trace: list[Step], name: str, options: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Run a policy and its reference side by side; yield the numbers of the pages that each lets go, in order."""
    policy, usage = make_policy(name, **options), Usage()
    pages: slow.Pages = []
    filled, positions = 0, [0, 0, 0]
    for now, step in enumerate(trace):
        shares = {page.number: step.shares[page.number % 24] for page in pages}
        slow.attend(pages, now, shares, read=len(pages) + 2)
        usage.attend(now, shares, read=len(pages) + 2)
        for lane, tokens in step.fills:
            positions[lane] += tokens
            usage.fill(filled, now, positions[lane] - 1, tokens, lane)
            pages.append(slow.Page(filled, now, positions[lane] - 1, tokens, lane))
            filled += 1
        for page in pages:
            page.bound = None if step.bounds is None else step.bounds[page.number % 24]
        view = usage.view(now, None if step.bounds is None else [step.bounds[n % 24] for n in usage.numbers])
        expected = slow.evicted(order(name, policy, pages, now, options), step.leave)
        found = leaving(policy, view, step.leave)
        yield [usage.numbers[index] for index in found], [page.number for page in expected]
        usage.drop(found)
        pages = [page for page in pages if page not in expected]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value) if value else "default")
@settings(max_examples=30)
@given(trace=traces())
def test_policies_evict_what_their_references_do(name: str, options: dict[str, Any], trace: list[Step]) -> None:
    """The same pages, in the same order, after every step."""
    for found, expected in replay(trace, name, options):
        assert found == expected


def random_view(pages: int, seed: int, lanes: int = 3, bounds: bool = True) -> PageStats:
    draw = np.random.default_rng(seed)
    step = 200
    born = draw.integers(0, 150, pages)
    uses = draw.integers(0, 4, pages)
    last = np.where(uses > 0, draw.integers(150, step + 1, pages), born)
    return PageStats(
        step=step,
        born=born,
        newest=draw.permutation(pages) * 32 + 31,
        tokens=draw.integers(1, 33, pages),
        mass=draw.random(pages),
        recent=draw.random(pages),
        last_use=last,
        previous_use=np.where(uses > 1, last - draw.integers(1, 100, pages), -1),
        uses=uses,
        lane=draw.integers(0, lanes, pages),
        bounds=draw.normal(size=pages) if bounds else None,
    )


def permuted(view: PageStats, order: np.ndarray) -> PageStats:
    columns = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    return PageStats(**{k: v[order] if isinstance(v, np.ndarray) else v for k, v in columns.items()})


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), pages=st.integers(1, 60))
def test_priorities_go_with_their_pages(name: str, seed: int, pages: int) -> None:
    """In another order, the pages have the same priorities, which are numbers."""
    policy, view = make_policy(name), random_view(pages, seed)
    order = np.random.default_rng(seed).permutation(pages)
    priority = policy.priority(view)
    np.testing.assert_allclose(policy.priority(permuted(view, order)), priority[order], rtol=1e-12)
    assert priority.dtype == np.float64
    assert priority.shape == (pages,)
    assert not np.isnan(priority).any()
    assert (priority > -np.inf).all()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), pages=st.integers(1, 60), tokens=st.integers(-1, 900))
def test_as_few_pages_leave_as_hold_the_tokens(name: str, seed: int, pages: int, tokens: int) -> None:
    """Those of the lowest priorities, without one that was not needed, and all of them where even they are too few."""
    policy, view = make_policy(name), random_view(pages, seed)
    gone = leaving(policy, view, tokens)
    held = view.tokens[gone]
    assert len(set(gone.tolist())) == len(gone)
    assert held.sum() >= min(tokens, view.tokens.sum())
    assert not len(gone) or held[:-1].sum() < tokens
    priority = policy.priority(view)
    ranks = list(zip(priority[gone], view.newest[gone], strict=True))
    assert ranks == sorted(ranks)
    stay = np.setdiff1d(np.arange(pages), gone)
    assert not len(gone) or not len(stay) or ranks[-1] < min(zip(priority[stay], view.newest[stay], strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_no_pages_are_no_trouble(name: str) -> None:
    policy, view = make_policy(name), random_view(0, 0)
    assert policy.priority(view).shape == (0,)
    assert leaving(policy, view, 10).shape == (0,)
    assert leaving(policy, random_view(5, 0), 0).shape == (0,)


def test_lru_without_uses_is_a_circular_buffer() -> None:
    """Of a budget of five pages, the page filled now takes the place of the one filled five pages ago."""
    policy, usage = make_policy("lru"), Usage()
    buffer: list[int] = [-1] * 5
    for number in range(23):
        usage.attend(number, {}, read=1)
        usage.fill(number, number, 4 * number + 3, 4, 0)
        buffer[number % 5] = number
        usage.drop(leaving(policy, usage.view(number), sum(usage.columns["tokens"]) - 20))
        assert sorted(usage.numbers) == sorted(page for page in buffer if page >= 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("h2o", {}), ("quest", {}), ("ada_kv", {}), ("pikv", {"mass_weight": 1, "recency_weight": 0, "reuse_weight": 0})],
)
def test_a_page_that_no_step_has_seen_counts_as_the_average_one(name: str, options: dict[str, Any]) -> None:
    """By its sum, which is 0, it would go before all others however little attention they get."""
    view = PageStats(
        step=100,
        born=np.array([0, 50, 100]),
        newest=np.array([31, 63, 95]),
        tokens=np.full(3, 32),
        mass=np.array([20.0, 0.5, 0.0]),
        recent=np.array([15.0, 0.4, 0.0]),
        last_use=np.full(3, 100),
        previous_use=np.full(3, -1),
        uses=np.ones(3, np.int64),
        lane=np.zeros(3, np.int64),
    )
    assert leaving(make_policy(name, **options), view, 96).tolist() == [1, 2, 0]
    assert leaving(make_policy("h2o", per_step=False), view, 96).tolist() == [2, 1, 0]


def test_ada_kv_gives_heads_what_they_need_and_each_its_safe_part() -> None:
    """A lane with even attention keeps more pages than one whose attention is on one page, which keeps its best."""
    view = dataclasses.replace(
        random_view(20, 0),
        lane=np.repeat([0, 1], 10),
        mass=np.concatenate([np.full(10, 0.1), [9.1], np.full(9, 0.1)]),
        newest=np.tile(np.arange(10), 2),
        tokens=np.full(20, 1),
    )
    stay = np.setdiff1d(np.arange(20), leaving(make_policy("ada_kv", alpha=0.2), view, 10))
    assert (stay < 10).sum() == 8
    assert 10 in stay
    assert (stay >= 10).sum() == 2


def test_a_low_hit_rate_lowers_the_threshold_and_a_high_one_raises_it() -> None:
    """And with it goes the number of pages that may leave ahead of need."""
    view = random_view(50, 1)
    start = float(np.median(PiKV().utility(view)))
    low, high = PiKV(threshold=start), PiKV(threshold=start)
    for _ in range(5):
        low.count_reads(hits=1, misses=9)
        high.count_reads(hits=100, misses=0)
    assert low.threshold < start < high.threshold
    assert len(low.surplus(view)) < 25 < len(high.surplus(view))
    for _ in range(200):
        low.count_reads(0, 1)
        high.count_reads(1, 0)
    assert (low.threshold, high.threshold) == (0.0, 1.0)


def test_no_access_and_the_target_leave_the_threshold_where_it_is() -> None:
    policy = PiKV(threshold=0.3, target_hit_rate=0.75)
    policy.count_reads(0, 0)
    policy.count_reads(3, 1)
    assert policy.threshold == 0.3


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_surplus_is_what_is_below_the_threshold_and_goes_first(threshold: float) -> None:
    policy, view = PiKV(threshold=threshold), random_view(80, 2)
    surplus, priority = policy.surplus(view), policy.priority(view)
    stay = np.setdiff1d(np.arange(80), surplus)
    assert (policy.utility(view)[surplus] < threshold).all()
    assert (policy.utility(view)[stay] >= threshold).all()
    assert priority[surplus].max(initial=-np.inf) <= priority[stay].min(initial=np.inf)
    assert surplus.tolist() == leaving(policy, view, int(view.tokens[surplus].sum())).tolist()


def test_names_are_those_of_the_configuration() -> None:
    assert set(POLICIES) == set(SCHEDULERS)
    assert all(make_policy(name).name == name for name in POLICIES)
    assert {name for name in POLICIES if POLICIES[name].per_head} == {"ada_kv", "duo"}
    assert {name for name in POLICIES if POLICIES[name].wants_bounds} == {"quest"}


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="'strem_llm', did you mean 'streaming_llm'"):
        make_policy("strem_llm")
    with pytest.raises(TypeError, match="'duo' has no option 'litle', did you mean 'little'"):
        make_policy("duo", litle=1)
    with pytest.raises(TypeError, match="'lru' has no option 'alpha'; it has none"):
        make_policy("lru", alpha=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ada_kv", {"alpha": 1.5}),
        ("duo", {"little": -0.1}),
        ("two_queue", {"first_share": 2}),
        ("pikv", {"threshold": 1.1}),
        ("pikv", {"target_hit_rate": float("nan")}),
        ("pikv", {"half_life": 0}),
        ("pikv", {"mass_weight": -1}),
        ("pikv", {"mass_weight": 0, "recency_weight": 0, "reuse_weight": 0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"scheduler '{name}'"):
        make_policy(name, **options)


def test_priorities_of_another_shape_are_refused() -> None:
    class Wrong(SchedulingPolicy):
        name = "wrong"

        def priority(self, view: PageStats) -> np.ndarray:
            return np.zeros(len(view) + 1)

    with pytest.raises(ValueError, match=r"shape \(6,\) for 5 pages"):
        leaving(Wrong(), random_view(5, 0), 1)
