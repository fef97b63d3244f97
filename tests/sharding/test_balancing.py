"""Packing, replicas and shards of about equal load."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pikv_hf.sharding.load_balancing import balanced_replicas, balanced_shards, bin_loads, imbalance, pack, replicate
from pikv_hf.sharding.placement import balanced_placement, expert_placement

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 12))
def test_no_bin_exceeds_the_mean_by_more_than_an_item(loads: list[int], bins: int) -> None:
    packed = bin_loads(loads, pack(loads, bins), bins)
    assert packed.sum() == sum(loads)
    assert packed.max() <= sum(loads) / bins + max(loads)


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 12), st.integers(0, 3))
def test_no_bin_takes_more_items_than_it_may(loads: list[int], bins: int, spare: int) -> None:
    most = -(-len(loads) // bins) + spare
    numbers = pack(loads, bins, most)
    counts = np.bincount(numbers, minlength=bins)
    assert len(counts) == bins
    assert counts.sum() == len(loads)
    assert counts.max() <= most


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True), st.integers(1, 6), st.randoms())
def test_the_order_of_items_does_not_matter(loads: list[int], bins: int, random: object) -> None:
    order = list(range(len(loads)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = np.array(loads)[order]
    most = -(-len(loads) // bins)
    for limit in (None, most):
        np.testing.assert_array_equal(pack(shuffled, bins, limit), pack(loads, bins, limit)[order])


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 6), st.randoms())
def test_equal_items_change_places_but_not_the_bins(loads: list[int], bins: int, random: object) -> None:
    shuffled = list(loads)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        bin_loads(shuffled, pack(shuffled, bins), bins), bin_loads(loads, pack(loads, bins), bins)
    )


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 8))
def test_packing_follows_the_rule_step_by_step(loads: list[int], bins: int) -> None:
    totals, counts = [0] * bins, [0] * bins
    numbers = pack(loads, bins)
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        wanted = min(range(bins), key=lambda number: (totals[number], counts[number], number))
        assert numbers[item] == wanted
        totals[wanted] += loads[item]
        counts[wanted] += 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=7), st.integers(2, 3))
def test_packing_is_within_four_thirds_of_the_best(loads: list[int], bins: int) -> None:
    packed = bin_loads(loads, pack(loads, bins), bins).max()
    best = min(
        max(sum(load for load, place in zip(loads, places, strict=True) if place == number) for number in range(bins))
        for places in itertools.product(range(bins), repeat=len(loads))
    )
    # Graham's bound for the longest-processing-time rule.
    assert packed <= best * (4 / 3 - 1 / (3 * bins)) + 1e-9


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 20))
def test_replicas_go_to_the_highest_load_per_replica(loads: list[int], extra: int) -> None:
    items = replicate(loads, extra)
    assert items.shape == (len(loads) + extra,)
    assert items.dtype == np.int64
    np.testing.assert_array_equal(items[: len(loads)], np.arange(len(loads)))
    counts = np.bincount(items, minlength=len(loads))
    # Were a replica taken back from any item, it would carry no less than each other item does now.
    for item in np.flatnonzero(counts > 1):
        assert loads[item] / (counts[item] - 1) >= max(np.array(loads) / counts) - 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=20, unique=True), st.integers(0, 12), st.randoms())
def test_replicas_do_not_depend_on_the_order_of_items(loads: list[int], extra: int, random: object) -> None:
    order = list(range(len(loads)))
    random.shuffle(order)  # type: ignore[attr-defined]
    counts = np.bincount(replicate(loads, extra), minlength=len(loads))
    shares = [load / count for load, count in zip(loads, counts, strict=True)]
    assume(len(set(shares)) == len(shares))
    shuffled = np.bincount(replicate(np.array(loads)[order], extra), minlength=len(loads))
    assert sorted(np.array(loads)[order] / shuffled) == sorted(shares)


@pytest.mark.parametrize(("experts", "shards"), [(8, 4), (8, 3), (128, 16), (4, 8), (6, 1)])
@pytest.mark.parametrize("load", [0.0, 1.0, 7.5])
def test_equal_loads_keep_neighbouring_experts_together(experts: int, shards: int, load: float) -> None:
    wanted = np.arange(experts) * min(shards, experts) // experts
    np.testing.assert_array_equal(balanced_shards(np.full(experts, load), shards), wanted)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 12))
def test_shards_are_no_worse_than_neighbours_or_greedy(loads: list[int], shards: int) -> None:
    count = min(shards, len(loads))
    chosen = balanced_shards(loads, shards)
    heaviest = bin_loads(loads, chosen, count).max()
    neighbours = np.arange(len(loads)) * count // len(loads)
    assert chosen.max() < count
    assert heaviest <= bin_loads(loads, neighbours, count).max()
    assert heaviest <= bin_loads(loads, pack(loads, count), count).max()
    np.testing.assert_array_equal(chosen, balanced_shards(list(loads), shards))


def test_imbalance() -> None:
    assert imbalance([1, 1, 2]) == 1.5
    assert imbalance([0, 0]) == imbalance([]) == 1.0


def test_no_items() -> None:
    assert pack([], 3).shape == replicate([], 0).shape == balanced_shards([], 3).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([[1.0]], 2), r"one dimension, got shape \(1, 1\)"),
        (lambda: pack([1.0, -2.0], 2), "got -2.0 at 1"),
        (lambda: pack([1.0, float("nan")], 2), "got nan at 1"),
        (lambda: pack([1.0], 0), "bins has to be at least 1, got 0"),
        (lambda: pack([1.0] * 5, 2, 2), "5 items do not fit into 2 bins of at most 2"),
        (lambda: replicate([1.0], -1), "extra has to be at least 0, got -1"),
        (lambda: replicate([], 2), "2 replicas of no items"),
        (lambda: balanced_shards([1.0], 0), "num_shards has to be at least 1, got 0"),
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_equal_loads_are_placed_as_experts_are() -> None:
    experts = torch.arange(16)
    positions = torch.arange(100, 116)
    wanted = expert_placement(16, 5, 0)(positions, experts)
    for load in (0.0, 3.0):
        assert balanced_placement(np.full(16, load), 5, 32, 0)(positions, experts).equal(wanted)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 5), st.sampled_from([1, 4])
)
def test_every_token_has_one_shard_and_experts_take_turns(
    loads: list[int], shards: int, replicas: int, page_size: int
) -> None:
    experts, shard_of_replica = balanced_replicas(loads, shards, replicas)
    place = balanced_placement(loads, shards, page_size, 0, replicas)
    for expert in range(len(loads)):
        places = shard_of_replica[experts == expert]
        positions = torch.arange(3 * page_size * len(places))
        got = place(positions, torch.full_like(positions, expert))
        wanted = [places[position // page_size % len(places)] for position in positions.tolist()]
        assert got.tolist() == wanted
        assert got.max() < shards


def test_replicas_use_shards_that_experts_alone_cannot() -> None:
    loads = [8.0, 4.0, 2.0, 2.0]
    _, alone = balanced_replicas(loads, 8)
    experts, shards = balanced_replicas(loads, 8, 4)
    assert len(set(alone)) == 4
    assert len(set(shards)) == 8
    assert imbalance(bin_loads(np.array(loads)[experts] / np.bincount(experts)[experts], shards, 8)) == 1.0


def test_unknown_experts_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"layer 3: .*no expert for 1 of 2 tokens"):
        balanced_placement([1.0, 1.0], 2, 32, 3)(torch.arange(2), torch.tensor([0, -1]))


def test_wrong_placements() -> None:
    with pytest.raises(ValueError, match="page_size has to be at least 1, got 0"):
        balanced_placement([1.0], 1, 0, 0)
    with pytest.raises(ValueError, match="has to be an expert"):
        balanced_placement([], 1, 32, 0)
