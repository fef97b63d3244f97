"""Dividing shards among parts: properties for any loads and weights."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.sharding.shard_map import MAX_SKEW, MIN_PAGES, ShardMap

LOADS = st.lists(st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 10**7)), min_size=1, max_size=40)
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.05, 20)), min_size=1, max_size=9).filter(sum)
PAGE = 16


def divided(loads: list[int], weights: list[float], whole: bool = False, page_size: int = PAGE) -> ShardMap:
    made = ShardMap(len(loads), weights, page_size, whole)
    made.divide(np.array(loads))
    return made


def owners(made: ShardMap, shards: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the part of each token; every part says the same of it."""
    own = np.stack([made.own(shards, positions, part) for part in range(made.parts)])
    mine = own >= 0
    assert (mine.sum(axis=0) == 1).all(), "a token has no part, or several"
    assert (own.max(axis=0) == shards).all()
    # What the others say of a token names its part and shard.
    where = mine.argmax(axis=0)
    others = -1 - own
    assert (np.where(mine, where * made.num_shards + shards, others) == where * made.num_shards + shards).all()
    return where


@settings(max_examples=200)
@given(LOADS, WEIGHTS, st.booleans())
def test_fractions_are_shares_of_every_shard(loads: list[int], weights: list[float], whole: bool) -> None:
    made = divided(loads, weights, whole)
    assert made.fractions.shape == (len(loads), len(weights))
    assert (made.fractions >= 0).all()
    np.testing.assert_allclose(made.fractions.sum(axis=1), 1, atol=1e-12)
    assert (made.fractions[:, np.array(weights) == 0] == 0).all(), "a part that is to have nothing got some"
    shares = (made.fractions > 0).sum(axis=1)
    if whole:
        assert (shares == 1).all()
    else:
        # Each border between two parts divides one shard at most.
        assert (shares - 1).sum() <= np.count_nonzero(weights) - 1


@settings(max_examples=200)
@given(LOADS, WEIGHTS)
def test_parts_are_as_full_as_they_should_be(loads: list[int], weights: list[float]) -> None:
    """Exactly so of the loads, each of which counts one more: a shard without tokens has a place too."""
    made, lengths = divided(loads, weights), np.array(loads) + 1.0
    filled = lengths @ made.fractions
    np.testing.assert_allclose(filled, lengths.sum() * np.array(weights) / sum(weights), rtol=1e-9, atol=1e-6)


@settings(max_examples=100)
@given(LOADS, st.integers(1, 9))
def test_whole_shards_are_packed(loads: list[int], parts: int) -> None:
    """The longest first, into the emptiest part: no part exceeds the mean by more than a shard (Graham 1969)."""
    made, lengths = divided(loads, [1.0] * parts, whole=True), np.array(loads) + 1.0
    assert (lengths @ made.fractions).max() <= lengths.sum() / parts + lengths.max()


@settings(max_examples=100)
@given(LOADS, WEIGHTS, st.booleans(), st.integers(0, 2**16))
def test_every_token_is_of_one_part(loads: list[int], weights: list[float], whole: bool, seed: int) -> None:
    made, random = divided(loads, weights, whole), np.random.default_rng(seed)
    shards, positions = random.integers(0, len(loads), 500), random.integers(0, 2**20, 500)
    where = owners(made, shards, positions)
    assert (made.fractions[shards, where] > 0).all()
    # Tokens of a shard and page of positions stay together.
    assert (owners(made, shards, positions // PAGE * PAGE) == where).all()


@settings(max_examples=100)
@given(WEIGHTS, st.integers(0, 2**20), st.integers(1, 3000), st.sampled_from([1, 3, 16, 64]))
def test_runs_of_a_shard_are_divided_within_a_few_pages(
    weights: list[float], start: int, pages: int, page_size: int
) -> None:
    """However a run of pages begins: multiples of the golden ratio fill every interval evenly.

    Within three pages of up to 3,000 and an interval (their discrepancy grows as the logarithm of their number).
    """
    made = divided([0], weights, page_size=page_size)
    positions = (start + np.arange(pages)) * page_size
    where = owners(made, np.zeros(pages, dtype=np.int64), positions)
    filled = np.bincount(where, minlength=made.parts)
    assert np.abs(filled - pages * made.fractions[0]).max() <= 3


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=16),
    st.lists(st.floats(0.3, 3), min_size=1, max_size=8),
    st.integers(0, 2**16),
)
def test_planned_by_its_own_counts_a_prompt_fills_parts_evenly(
    chances: list[int], weights: list[float], seed: int
) -> None:
    """However skewed its experts are, within a page of each divided shard and what chance makes of single tokens."""
    tokens, random = 40_000, np.random.default_rng(seed)
    shards = random.choice(len(chances), tokens, p=np.array(chances) / sum(chances))
    made = divided(np.bincount(shards, minlength=len(chances)).tolist(), weights)
    filled = np.bincount(owners(made, shards, np.arange(tokens)), minlength=made.parts)
    assert np.abs(filled / tokens - made.weights).max() < 0.02


def test_counts_are_those_of_the_tokens_that_left() -> None:
    made = divided([5, 5, 5], [1.0, 2.0])
    shards, positions = np.array([0, 1, 2, 2, 1]), np.array([0, 20, 40, 60, 80])
    for part in range(2):
        each = divided([5, 5, 5], [1.0, 2.0])
        each.note(each.own(shards, positions, part), part)
        made.note(made.own(shards, positions, part), part)
        assert each.loads.tolist() == [1, 2, 2]
        where = owners(each, shards, positions)
        assert each.placed.tolist() == np.bincount(where, minlength=2).tolist()
    assert made.placed.sum() == 10


def test_what_is_counted_in_vain_is_forgotten() -> None:
    made = divided([3, 1], [1.0, 1.0])
    made.note(np.array([0, 1]), 0)
    with contextlib.suppress(MemoryError), made.transaction():
        made.note(np.array([0, 0, 1]), 0)
        raise MemoryError
    assert made.loads.tolist() == [1, 1]
    assert made.placed.tolist() == [2, 0]
    with made.transaction():
        made.note(np.array([0]), 0)
    assert made.loads.tolist() == [2, 1]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("change", [[0.8, 0.1, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_when_a_router_changes_its_mind_balance_returns(weights: list[float], change: list[float]) -> None:
    """Planned for even experts, then they are not: what comes next goes to the parts that have too little."""
    random, made = np.random.default_rng(1), divided([1000] * 4, weights)
    where = owners(made, shards := random.integers(0, 4, 4000), np.arange(4000))
    made.note(np.where(where == 0, shards, -1 - (where * 4 + shards)), 0)
    position, redone, worst = 4000, 0, 0.0
    for _ in range(1000):
        shards, positions = random.choice(4, PAGE, p=change), np.arange(position, position + PAGE)
        made.note(made.own(shards, positions, 0), 0)
        redone += made.divide_if_skewed()
        worst, position = max(worst, made.skew), position + PAGE
    assert redone >= 1
    assert made.skew <= MAX_SKEW + 0.01
    assert worst < 0.1
    assert made.loads.sum() == 20_000


def test_divided_anew_only_when_it_matters() -> None:
    made = divided([10, 10], [1.0, 1.0])
    assert made.skew == 0
    few = MIN_PAGES * PAGE * 2 - 1
    made.note(np.zeros(few, dtype=np.int64), 0)
    assert made.skew == 1
    assert not made.divide_if_skewed(), "single pages would tip the scales"
    made.note(np.zeros(PAGE, dtype=np.int64), 0)
    assert made.divide_if_skewed()
    assert made.fractions[0].tolist() == [0, 1], "the other part gets what comes next"
    never = divided([10, 10], [1.0, 1.0], whole=True)
    never.note(np.zeros(10 * few, dtype=np.int64), 0)
    assert not never.divide_if_skewed()


def test_rescaled_with_what_is_left() -> None:
    made = divided([0, 0], [1.0, 1.0])
    made.note(np.array([0] * 60 + [1] * 40), 0)
    made.rescale(0.5)
    assert made.loads.tolist() == [30, 20]
    assert made.placed.tolist() == [50, 0]


def test_more_parts_than_shards_divide_them() -> None:
    made = divided([100, 100], [1.0] * 5)
    np.testing.assert_allclose(np.array([101, 101]) @ made.fractions, [40.4] * 5)
    used = [set(np.flatnonzero(row)) for row in made.fractions]
    assert used == [{0, 1, 2}, {2, 3, 4}]
    assert [sorted(each) for each in itertools.accumulate(used, set.union)][-1] == [0, 1, 2, 3, 4]
