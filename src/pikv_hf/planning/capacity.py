"""How many tokens a shard must have room for, and how many pages its tokens take.

Section 9 of PiKV (arXiv 2508.06526) sizes shards evenly; routers do not load them so. Of L tokens of which each goes to
shard e with probability p_e, the shard gets a binomial number: p_e L on average, with a standard deviation of
sqrt(p_e (1 - p_e) L), which sqrt(p_e L) bounds.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .distributions import binomial_tail


@dataclasses.dataclass(frozen=True, slots=True)
class ShardCapacity:
    """Room for the tokens of one sequence and layer in its most loaded shard.

    Attributes
    ----------
    tokens : int
        S, the room.
    expected : float
        Tokens that come on average.
    load : float
        p_e, the share of the shard.
    z : float
        The margin, in units of sqrt(p_e L).
    overflow : float
        The probability that more than S tokens come, of this shard.
    any_overflow : float
        An upper bound of the probability that any of the shards overflows, all having this room or their own: the sum
        over shards.
    """

    tokens: int
    expected: float
    load: float
    z: float
    overflow: float
    any_overflow: float


def shard_capacity(tokens: int, loads: Sequence[float], z: float = 3.0) -> ShardCapacity:
    """Return the capacity S = p_e L + z sqrt(p_e L) of the most loaded shard.

    Parameters
    ----------
    tokens : int
        L, tokens that are divided.
    loads : sequence of float
        p_e by shard; they add up to 1. See :func:`uniform_loads` and :func:`measured_loads`.
    z : float
        The margin.

    Raises
    ------
    ValueError
        For numbers that are negative or not finite, or loads that do not add up to 1.
    """
    shares = _checked(loads)
    if tokens < 0 or not 0 <= z < np.inf:
        raise ValueError(f"tokens and z must be finite and not negative, got {tokens} and {z}")
    rooms = np.minimum(tokens, np.ceil(shares * tokens + z * np.sqrt(shares * tokens)))
    overflow = np.array([binomial_tail(room, tokens, share) for room, share in zip(rooms, shares, strict=True)])
    worst = int(np.argmax(shares))
    return ShardCapacity(
        tokens=int(rooms[worst]),
        expected=float(shares[worst] * tokens),
        load=float(shares[worst]),
        z=z,
        overflow=float(overflow[worst]),
        any_overflow=min(1.0, float(overflow.sum())),
    )


def uniform_loads(shards: int) -> tuple[float, ...]:
    """Return equal shares for so many shards.

    Raises
    ------
    ValueError
        If there are none.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    return (1 / shards,) * shards


def measured_loads(expert_tokens: Sequence[float], shards: int) -> tuple[float, ...]:
    """Return the shares of shards of neighbouring experts, as `expert_placement` forms them.

    Parameters
    ----------
    expert_tokens : sequence of float
        Tokens whose primary expert was each, in order of the experts: what a routing trace counted.
    shards : int
        Shards; more than there are experts leave the rest empty, which are left out.

    Raises
    ------
    ValueError
        If nothing was counted, or something negative.
    """
    counts = np.asarray(expert_tokens, dtype=np.float64)
    if not len(counts) or (counts < 0).any() or not counts.sum():
        raise ValueError(f"expert_tokens must be counts of tokens with a positive sum, got {list(expert_tokens)}")
    used = min(shards, len(counts))
    sums = np.zeros(used)
    np.add.at(sums, np.arange(len(counts)) * used // len(counts), counts)
    return tuple((sums / sums.sum()).tolist())


def expected_pages(tokens: int, loads: Sequence[float], page_size: int) -> tuple[float, float]:
    """Return how many pages the tokens of all shards begin on average, and how many they fill.

    Parameters
    ----------
    tokens : int
        To be divided.
    loads : sequence of float
        Shares by shard.
    page_size : int
        Tokens per page.
    """
    begun = full = 0.0
    for share in loads:
        mean = tokens * share
        if mean > 8 * page_size and tokens * share * (1 - share) > page_size:
            # The last page is filled evenly: its remainder is as likely to be anything from 0 to page_size - 1.
            begun += mean / page_size + (page_size - 1) / (2 * page_size)
            full += mean / page_size - (page_size - 1) / (2 * page_size)
        else:
            edges = np.arange(0, tokens + page_size, page_size)
            begun += float(binomial_tail(edges, tokens, share).sum())
            full += float(binomial_tail(edges[1:] - 1, tokens, share).sum())
    return begun, full


def _checked(loads: Sequence[float]) -> np.ndarray:
    shares = np.asarray(loads, dtype=np.float64)
    if not len(shares) or (shares < 0).any() or not math.isclose(float(shares.sum()), 1.0, rel_tol=1e-6):
        raise ValueError(f"loads must be shares of at least 0 that add up to 1, got a sum of {float(shares.sum()):g}")
    return shares
