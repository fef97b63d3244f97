"""Balancing loads: items to bins, and replicas of the heaviest items.

The greedy steps of expert-parallel load balancing (EPLB; DeepSeek-V3 technical report, arXiv 2412.19437, section 3.4;
github.com/deepseek-ai/EPLB), here for keys and values instead of expert weights. Every process works out its placement
for itself and all have to agree, so each function depends on nothing but its arguments: ties go to the lowest index,
and sums are taken one number at a time in a fixed order. Counts of tokens add up exactly in any order.
"""

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


def pack(loads: npt.ArrayLike, bins: int, most: int | None = None) -> Numbers:
    """Spread items over bins, the heaviest item first, each into the lightest bin with room.

    That is the longest-processing-time rule (Graham 1969). Without `most`, no bin is heavier than the mean of the bins
    plus the heaviest item.

    Parameters
    ----------
    loads : array_like
        `(N,)`, what each item weighs, finite and not negative.
    bins : int
        Bins, at least 1.
    most : int, optional
        Items that a bin takes at most; by default as many as come.

    Returns
    -------
    numpy.ndarray
        `(N,)` int64, the bin of each item. Of equally heavy items the one with the lowest index goes first; of equally
        light bins the one with the fewest items takes it, then the one with the lowest number.

    Raises
    ------
    ValueError
        If loads are no finite, non-negative vector, or the bins have no room for all items.

    Examples
    --------
    >>> pack([3, 1, 1, 1], bins=2)
    array([0, 1, 1, 1])
    >>> pack([3, 1, 1, 1], bins=2, most=2)
    array([0, 1, 1, 0])
    """
    weights = _vector(loads)
    _at_least("bins", bins, 1)
    if most is not None:
        _at_least("most", most, 0)
        if bins * most < len(weights):
            raise ValueError(f"{len(weights)} items do not fit into {bins} bins of at most {most} items")
    open_bins = [(0.0, 0, number) for number in range(bins)]
    bin_of = np.empty(len(weights), np.int64)
    for item in _heaviest_first(weights):
        load, count, number = heapq.heappop(open_bins)
        bin_of[item] = number
        if most is None or count + 1 < most:
            heapq.heappush(open_bins, (load + float(weights[item]), count + 1, number))
    return bin_of


def replicate(loads: npt.ArrayLike, extra: int) -> Numbers:
    """Give replicas to items, each to the one that then carries the highest load per replica.

    Parameters
    ----------
    loads : array_like
        `(N,)`, what each item weighs, finite and not negative. It is shared equally by the item's replicas.
    extra : int
        Replicas beyond the first of each item.

    Returns
    -------
    numpy.ndarray
        `(N + extra,)` int64, the item that each replica is of: 0 to N - 1, then the extra ones in the order in which
        they were given away. Of equally loaded items the one with the lowest index gets it.

    Raises
    ------
    ValueError
        If loads are no finite, non-negative vector, `extra` is negative, or there is no item to replicate.

    Examples
    --------
    >>> replicate([6, 1, 4], extra=3)
    array([0, 1, 2, 0, 2, 0])
    """
    weights = _vector(loads)
    _at_least("extra", extra, 0)
    if extra and not len(weights):
        raise ValueError(f"{extra} replicas of no items")
    counts = np.ones(len(weights), np.int64)
    items = np.concatenate([np.arange(len(weights)), np.zeros(extra, np.int64)])
    for replica in range(len(weights), len(items)):
        # argmax returns the first of equals.
        items[replica] = heaviest = int(np.argmax(weights / counts))
        counts[heaviest] += 1
    return items


def balanced_shards(loads: npt.ArrayLike, num_shards: int) -> Numbers:
    """Group experts into shards of about equal load.

    Parameters
    ----------
    loads : array_like
        `(E,)`, what each expert stores, such as counts of tokens; finite and not negative.
    num_shards : int
        Shards, at least 1. With fewer experts than shards every expert has one of its own and the rest stay empty.

    Returns
    -------
    numpy.ndarray
        `(E,)` int64, the shard of each expert. Neighbouring experts stay together, `expert * num_shards // E`, where
        the greedy assignment is no better balanced: so for equal loads, and for none. Shards may hold different numbers
        of experts: unlike that of expert weights, a shard's memory goes by its tokens.

    Raises
    ------
    ValueError
        If loads are no finite, non-negative vector, or there is no shard.
    """
    weights = _vector(loads)
    _at_least("num_shards", num_shards, 1)
    shards = min(num_shards, len(weights))
    if shards == 0:
        return np.empty(0, np.int64)
    neighbours = np.arange(len(weights), dtype=np.int64) * shards // len(weights)
    packed = pack(weights, shards)
    better = bin_loads(weights, packed, shards).max() < bin_loads(weights, neighbours, shards).max()
    return packed if better else neighbours


def balanced_replicas(loads: npt.ArrayLike, num_shards: int, hot_replicas: int = 0) -> tuple[Numbers, Numbers]:
    """Group experts and replicas of the hottest ones into shards of about equal load.

    Parameters
    ----------
    loads : array_like
        `(E,)`, what each expert stores; see :func:`balanced_shards`.
    num_shards : int
        Shards, at least 1.
    hot_replicas : int
        Replicas beyond one of each expert; see :func:`replicate`. With `num_shards - E` of them, no shard has to stay
        empty however few experts there are.

    Returns
    -------
    tuple of numpy.ndarray
        `(E + hot_replicas,)` int64 each: the expert that a replica is of, and its shard. Two replicas of an expert may
        be in the same shard.

    Raises
    ------
    ValueError
        If loads are no finite, non-negative vector of at least one expert, or a number is too small.

    Examples
    --------
    >>> balanced_replicas([6, 1, 1, 1], num_shards=3, hot_replicas=1)
    (array([0, 1, 2, 3, 0]), array([0, 2, 2, 2, 1]))
    """
    weights = _vector(loads)
    if not len(weights):
        raise ValueError("there has to be an expert, got loads of length 0")
    experts = replicate(weights, hot_replicas)
    return experts, balanced_shards((weights / np.bincount(experts))[experts], num_shards)


def bin_loads(loads: npt.ArrayLike, bin_of: npt.ArrayLike, bins: int) -> Loads:
    """Return the load of every bin, `(bins,)` float64, of items `(N,)` with their bins `(N,)`."""
    # bincount adds the items in their order, unlike sums that numpy splits by the width of a vector register.
    sums: Loads = np.bincount(
        np.asarray(bin_of, np.int64), weights=np.asarray(loads, np.float64), minlength=bins
    ).astype(np.float64)
    return sums


def imbalance(loads: npt.ArrayLike) -> float:
    """Return the heaviest bin's load over the mean, at least 1; 1 if all are empty or there are none."""
    weights = _vector(loads)
    total = float(np.add.accumulate(weights)[-1]) if len(weights) else 0.0
    return float(weights.max()) * len(weights) / total if total else 1.0


def _heaviest_first(weights: Loads) -> Numbers:
    return np.argsort(-weights, kind="stable").astype(np.int64)


def _vector(loads: npt.ArrayLike) -> Loads:
    weights: Any = np.asarray(loads, np.float64)
    if weights.ndim != 1:
        raise ValueError(f"loads need one dimension, got shape {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        wrong = int(np.flatnonzero(~np.isfinite(weights) | (weights < 0))[0])
        raise ValueError(f"loads are finite and not negative, got {weights[wrong]} at {wrong}")
    return weights


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} has to be at least {least}, got {value}")
