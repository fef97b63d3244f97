"""Recorded page accesses: the traces, Belady's optimum against brute force, and the committed results."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scheduling_reference as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.eval.studies.scheduling import attention_trace, page_traces
from pikv_hf.eval.studies.scheduling.attention_trace import PAGE, Recorder, Trace, page_shares, steps_of
from pikv_hf.eval.studies.scheduling.eviction_rules import RULES, belady, by_policy, random_order, simulate
from pikv_hf.eval.studies.scheduling.page_traces import CAPACITIES, LENGTHS, OPTIONS
from pikv_hf.eval.tasks import reference
from pikv_hf.scheduling.policies.registry import POLICIES, make_policy

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "page-traces.json"


@st.composite
def tiny_traces(draw: st.DrawFn, pages: int = 5, steps: int = 7) -> Trace:
    born = np.array(draw(st.lists(st.integers(0, 3), min_size=pages, max_size=pages)))
    shares = np.array(draw(st.lists(st.sampled_from((0.0, 0.125, 0.25, 0.5)), min_size=40, max_size=40)))[
        : pages * steps
    ]
    shares = np.where(np.arange(steps)[:, None] > born, shares.reshape(steps, pages), 0)
    lane = np.array(draw(st.lists(st.integers(0, 1), min_size=pages, max_size=pages)))
    counted = draw(st.integers(0, 3))
    return Trace(born, np.arange(pages) * PAGE + PAGE - 1, lane, shares, shares >= 0.25, counted)


def best_hits(trace: Trace, capacity: int) -> int:
    """The most hits that any sequence of contents of the tier has: every choice after every step is tried."""
    contents: dict[frozenset[int], int] = {frozenset(): 0}
    for step, used in enumerate(trace.used):
        wanted = set(used.nonzero()[0].tolist())
        filled = set((trace.born == step).nonzero()[0].tolist())
        following: dict[frozenset[int], int] = {}
        for here, hits in contents.items():
            now = hits + (len(wanted & here) if step >= trace.counted else 0)
            there = sorted(here | wanted | filled)
            for kept in itertools.combinations(there, min(capacity, len(there))):
                following[frozenset(kept)] = max(now, following.get(frozenset(kept), 0))
        contents = following
    return max(contents.values())


@settings(max_examples=60)
@given(trace=tiny_traces(), capacity=st.integers(1, 4))
def test_no_sequence_of_evictions_hits_more_than_belady(trace: Trace, capacity: int) -> None:
    hits, misses, _ = simulate(trace, belady(trace), capacity, returns=True)
    assert hits == best_hits(trace, capacity)
    assert hits + misses == trace.used[trace.counted :].sum()


def slow_pages(trace: Trace, step: int, there: list[int]) -> slow.Pages:
    """What the references know of pages after a step, from the trace itself."""
    pages = []
    for number in there:
        page = slow.Page(number, int(trace.born[number]), int(trace.newest[number]), PAGE, int(trace.lane[number]))
        page.shares = [(now, float(trace.shares[now, number])) for now in range(page.born + 1, step + 1)]
        page.uses = [now for now in range(step + 1) if trace.used[now, number]]
        pages.append(page)
    return pages


def slow_simulation(trace: Trace, name: str, capacity: int, *, returns: bool) -> tuple[int, int, float]:
    """Walk through the trace with lists and a reference policy."""
    here: list[int] = []
    hits, misses, lost = 0, 0, 0.0
    for step in range(len(trace.shares)):
        for number in range(len(trace.born)):
            if step >= trace.counted:
                hits += bool(trace.used[step, number]) and number in here
                misses += bool(trace.used[step, number]) and number not in here
                lost += 0.0 if number in here else float(trace.shares[step, number])
        for number in range(len(trace.born)):
            loaded = returns and trace.used[step, number]
            if number not in here and (loaded or trace.born[number] == step):
                here.append(number)
        order = slow.ORDERS[name](slow_pages(trace, step, sorted(here)), step)
        for page in order[: max(len(here) - capacity, 0)]:
            here.remove(page.number)
    return hits, misses, lost


@pytest.mark.parametrize("name", slow.ORDERS)
@settings(max_examples=15)
@given(trace=tiny_traces(), capacity=st.integers(1, 4), returns=st.booleans())
def test_the_simulation_counts_what_a_slow_one_does(name: str, trace: Trace, capacity: int, returns: bool) -> None:
    found = simulate(trace, by_policy(trace, make_policy(name)), capacity, returns=returns)
    assert found == pytest.approx(slow_simulation(trace, name, capacity, returns=returns))


@settings(max_examples=30)
@given(trace=tiny_traces(), returns=st.booleans())
def test_with_room_for_all_pages_nothing_is_missed(trace: Trace, returns: bool) -> None:
    hits, misses, lost = simulate(trace, random_order(trace), len(trace.born), returns=returns)
    assert (hits, misses, lost) == (trace.used[trace.counted :].sum(), 0, 0.0)


def slow_shares(query: torch.Tensor, keys: torch.Tensor, page: int, scale: float) -> float:
    """How much attention a page takes from the query at the last of the keys."""
    weights = (scale * keys @ query).softmax(0)
    return float(weights[page * PAGE : (page + 1) * PAGE].sum())


def slow_bound(query: torch.Tensor, keys: torch.Tensor, scale: float) -> float:
    """Return Quest's bound: in each channel the key of the page that suits the query best."""
    return scale * sum(max(q * k for k in column) for q, column in zip(query.tolist(), keys.T.tolist(), strict=True))


def test_shares_and_bounds_are_means_over_queries_and_heads_of_a_group() -> None:
    query = torch.randn(4, 100, 8, generator=torch.Generator().manual_seed(0))
    key = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(1))
    steps = [range(64), range(64, 99), range(99, 100)]
    shares, bounds = page_shares(query, key, 0.5, steps)
    assert shares.shape == bounds.shape == (3, 2, 100 // PAGE)
    for index, head, page in itertools.product(range(3), range(2), range(100 // PAGE)):
        group, last = (query[2 * head], query[2 * head + 1]), steps[index].stop
        share = [slow_shares(each[at], key[head, : at + 1], page, 0.5) for each in group for at in steps[index]]
        assert shares[index, head, page] == pytest.approx(np.mean(share), abs=1e-5)
        keys = key[head, page * PAGE : (page + 1) * PAGE]
        recent = range(last - attention_trace.RECENT_QUERIES, last)
        bound = [slow_bound(each[at], keys, 0.5) for each in group for at in recent]
        assert bounds[index, head, page] == pytest.approx(np.mean(bound), abs=1e-5)


def test_the_recorded_attention_is_that_of_the_model() -> None:
    """The eager attention of transformers on the same tokens, summed over the tokens of a page, in the last step."""
    sample, other = reference.generate(256, 2, tasks=["niah_single_1"], seed=3)
    recorder = Recorder()
    traces = recorder.record(sample, other)["row"]
    tokens, _ = recorder.tokens(sample, other)
    recorder.model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = recorder.model(tokens[None], output_attentions=True).attentions
    for trace, weights in zip(traces, attentions, strict=True):
        last = weights[0].mean(0)[-1].double().numpy()
        expected = [last[newest - PAGE + 1 : newest + 1].sum() for newest in trace.newest]
        np.testing.assert_allclose(trace.shares[-1][:-1], expected[:-1], atol=1e-5)


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Trace]]:
    samples = reference.generate(1024, 2, tasks=["niah_multikey_1"], seed=3)
    return Recorder().record(*samples)


def test_a_recording_has_every_page_that_may_go(recorded: dict[str, list[Trace]]) -> None:
    """From the second on, each after the step that moved the window past it; heads are lanes of their own."""
    for row, head in zip(recorded["row"], recorded["head"], strict=True):
        steps = len(row.shares)
        assert row.counted == steps - attention_trace.DECODED
        assert (row.lane == 0).all()
        assert set(head.lane.tolist()) == {0, 1, 2, 3}
        assert row.newest.tolist() == list(range(2 * PAGE - 1, row.newest[-1] + 1, PAGE))
        for trace in (row, head):
            assert not trace.used[np.arange(steps)[:, None] <= trace.born].any()
            assert trace.used[trace.counted :].any()
        mean = head.shares.reshape(steps, 4, -1).mean(1)
        np.testing.assert_allclose(mean, row.shares, atol=1e-9)
        assert (row.shares.sum(1) < 1).all()


def test_pages_are_born_when_the_window_has_passed_them() -> None:
    steps = steps_of(300, 310)
    assert [(step.start, step.stop) for step in steps[:4]] == [(0, 128), (128, 256), (256, 300), (300, 301)]
    shares = np.zeros((3 + attention_trace.DECODED, 1, 20))
    trace = attention_trace._trace(shares, shares, 300)
    ends = [128, 256, *range(300, 301 + attention_trace.DECODED)]
    for newest, born in zip(trace.newest, trace.born, strict=True):
        assert ends[born] - attention_trace.WINDOW > newest
        assert born == 0 or ends[born - 1] - attention_trace.WINDOW <= newest


def rows(results: dict[str, Any], pages: str, tokens: int, capacity: float) -> dict[str, dict[str, float]]:
    key = (pages, tokens, capacity)
    return {r["rule"]: r for r in results["results"] if (r["pages"], r["tokens"], r["capacity"]) == key}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


@pytest.mark.parametrize("pages", ["row", "head"])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_committed_results_are_complete_and_bounded(
    results: dict[str, Any], pages: str, tokens: int, capacity: float
) -> None:
    """Every rule; no hit rate above Belady's; no policy loses less than one that knows what is to come."""
    found = rows(results, pages, tokens, capacity)
    assert set(found) == set(RULES)
    for name in (*POLICIES, "random"):
        assert found[name]["hit_rate"] <= found["belady"]["hit_rate"]
        assert found[name]["lost"] >= found["future_mass"]["lost"]


def test_the_weights_of_pikv_are_the_best_of_those_compared(results: dict[str, Any]) -> None:
    best = results["options"][0]
    assert {name: best[name] for name in OPTIONS} == {name: getattr(make_policy("pikv"), name) for name in OPTIONS}
    margins = [row["hit_rate"] - row["lost"] for row in results["options"]]
    # Rows are rounded to four digits.
    assert margins == sorted(margins, reverse=True) or np.diff(margins).max() < 2e-4
    assert len(margins) == len(page_traces.CANDIDATES)


def test_the_committed_results_say_where_they_come_from(results: dict[str, Any]) -> None:
    assert re.match(r"python -m pikv_hf\.eval\.(experiments|studies\.scheduling)\.page_traces ", results["command"])
    assert results["samples"] == len(reference.TASKS) * results["samples_per_task"]
    assert results["seed"] != results["training"]["seed"]
    assert not re.search(r'[ "=]/\w|~/', RESULTS.read_text()), "the file names a folder of the machine"
