"""Scheduling policies by name: which pages go first, evicted or moved to a slower tier, when a limit is exceeded.

A policy sees statistics of the pages that may go (sinks and recent window never do) and gives each a priority; the
lowest goes first. Statistics come from the attention masses that the kernels return. A page "is used" in a step when it
takes at least its equal share of the attention: one over the number of pages read.

Each policy is in a file of its name beside this one; importing this module makes all of them known.
"""

import dataclasses
from typing import Any

import numpy as np

from ...common.suggest import did_you_mean
from .ada_kv import AdaKV
from .base import POLICIES, SchedulingPolicy
from .duo import Duo
from .h2o import H2O
from .lru import LRU
from .lru_plus import LRUPlus
from .page_stats import Floats, Integers, PageStats, expected_distance, mean_shares, recent_shares
from .pikv import PiKV
from .quest import Quest
from .reuse_distance import ReuseDistance
from .streaming_llm import StreamingLLM
from .two_queue import TwoQueue

__all__ = [
    "H2O",
    "LRU",
    "POLICIES",
    "AdaKV",
    "Duo",
    "Floats",
    "Integers",
    "LRUPlus",
    "PageStats",
    "PiKV",
    "Quest",
    "ReuseDistance",
    "SchedulingPolicy",
    "StreamingLLM",
    "TwoQueue",
    "expected_distance",
    "leaving",
    "make_policy",
    "mean_shares",
    "recent_shares",
]


def leaving(policy: SchedulingPolicy, view: PageStats, tokens: int) -> Integers:
    """Return the fewest pages, in the order in which `policy` lets them go, that hold at least `tokens` tokens.

    Parameters
    ----------
    policy : SchedulingPolicy
        Whose lowest priorities go first; of equal ones the page with the oldest `newest`.
    view : PageStats
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
    tokens_gone = np.cumsum(view.tokens[order])
    return order[: int(np.searchsorted(tokens_gone, tokens)) + 1].astype(np.int64)


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
