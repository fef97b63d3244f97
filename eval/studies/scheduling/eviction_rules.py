"""Decide which pages leave a recorded trace: the cache's policies, chance, and what could be known afterwards."""

from collections.abc import Callable
from functools import partial

import numpy as np

from pikv_hf.eval.studies.scheduling.attention_trace import PAGE, Trace
from pikv_hf.scheduling.policies.registry import POLICIES, Integers, SchedulingPolicy, leaving, make_policy

#: From a step, the pages that are there and how many of these have to go, to indices of those that go.
Rule = Callable[[int, Integers, int], Integers]


def by_policy(trace: Trace, policy: SchedulingPolicy) -> Rule:
    """Let a policy of the cache decide."""
    return lambda step, pages, excess: leaving(policy, trace.view(step, pages), excess * PAGE)


def belady(trace: Trace) -> Rule:
    """MIN (Belady, IBM Systems Journal 1966): the page that is used again last, or never, goes first."""
    return lambda step, pages, excess: np.argsort(-trace.next_use[step, pages], kind="stable")[:excess]


def future_mass(trace: Trace) -> Rule:
    """The page with the least attention still to come goes first: greedy, so a budget's optimum only nearly."""
    return lambda step, pages, excess: np.argsort(trace.future_mass[step, pages], kind="stable")[:excess]


def random_order(trace: Trace) -> Rule:
    """Any page goes, each as likely as any other."""
    draw = np.random.default_rng(0)
    return lambda step, pages, excess: draw.choice(len(pages), excess, replace=False)


#: What could be known afterwards, chance, and the policies.
RULES: dict[str, Callable[[Trace], Rule]] = {
    "belady": belady,
    "future_mass": future_mass,
    "random": random_order,
    "h2o, sums": lambda trace: by_policy(trace, make_policy("h2o", per_step=False)),
    **{name: partial(lambda name, trace: by_policy(trace, make_policy(name)), name) for name in POLICIES},
}


def simulate(trace: Trace, rule: Rule, capacity: int, *, returns: bool) -> tuple[int, int, float]:
    """Let a rule manage `capacity` pages.

    Parameters
    ----------
    trace : Trace
        Of n pages and S steps.
    rule : callable
        Asked after each step, when the attention of the step is known.
    capacity : int
        Pages that may stay.
    returns : bool
        Whether used pages that had left are loaded again (a tier) or are gone (a budget).

    Returns
    -------
    hits, misses, lost : int, int, float
        Over the counted steps: used pages that were there and that were not, and the sum of the shares of the attention
        that were not there.
    """
    here = np.zeros(len(trace.born), bool)
    hits, misses, lost = 0, 0, 0.0
    for step, used in enumerate(trace.used):
        if step >= trace.counted:
            hits += int((used & here).sum())
            misses += int((used & ~here).sum())
            lost += float(trace.shares[step, ~here].sum())
        if returns:
            here |= used
        here |= trace.born == step
        pages = here.nonzero()[0]
        if len(pages) > capacity:
            here[pages[rule(step, pages, len(pages) - capacity)]] = False
    return hits, misses, lost
