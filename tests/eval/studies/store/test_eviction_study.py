"""The simulated store against a plain list of texts, and what policies reuse of traces."""

import pytest

from pikv_hf.eval.studies.store.eviction_study import POLICIES, Simulated, row_of
from pikv_hf.eval.studies.store.request_traces import TRACES, Trace


def known_without_limit(trace: Trace) -> float:
    known = total = 0
    for step, (prompt, _) in enumerate(trace):
        before = [text for _, text in trace[:step]]
        shared = (
            next((n for n, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), None)
            for text in before
        )
        known += max(
            (min(len(prompt), len(text)) if n is None else n for n, text in zip(shared, before, strict=True)), default=0
        )
        total += len(prompt)
    return known / total


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_limit_everything_is_known(name: str, policy: str) -> None:
    trace = TRACES[name](3, 40)
    store = Simulated(trace, 10**9, POLICIES[policy])
    assert store.reused() == pytest.approx(known_without_limit(trace))


@pytest.mark.parametrize("name", TRACES)
def test_a_limit_holds_and_knowing_the_future_helps(name: str) -> None:
    trace = TRACES[name](1, 120)
    tokens = len({block for _, text in trace for block in text})
    reused = {}
    for policy, evict in POLICIES.items():
        store = Simulated(trace, tokens // 5, evict)
        reused[policy] = store.reused()
        held = sum(len(node.edge) for node in store.tree.root.below())
        assert held <= tokens // 5
    assert reused["belady"] >= max(reused.values()) - 0.02
    assert 0 < min(reused.values()) < known_without_limit(trace)


def test_a_row_says_the_range_over_seeds() -> None:
    row = row_of("documents", 0.5, "lru", [TRACES["documents"](seed, 60) for seed in range(2)])
    assert row["range"][0] <= row["reused"] <= row["range"][1]
