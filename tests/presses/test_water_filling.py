"""Water-filling of a byte budget over the tokens of a KV cache."""

import itertools
import math
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.allocation.bit_allocation import (
    EVICTED,
    FULL,
    HOST_BYTES,
    PageCost,
    allocate,
    allocate_beside,
    pages_nbytes,
)
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import Kind

RATIOS = {0: 1.0, 2: 0.2, 4: 0.01, 8: 1e-4}


def proportional(loss: torch.Tensor) -> dict[int, torch.Tensor]:
    return {width: loss * ratio for width, ratio in RATIOS.items()}


def total_loss(widths: torch.Tensor, losses: dict[int, torch.Tensor]) -> float:
    return sum(loss[widths == width].double().sum().item() for width, loss in losses.items())


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[int, torch.Tensor], PageCost, int, torch.Tensor]:
    lanes, tokens, page_size, sinks = (draw(st.integers(1, top)) for top in (3, 40, 9, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    loss = torch.rand(2, lanes, tokens, generator=generator).pow(draw(st.sampled_from((0, 1, 8))))
    padding = torch.randint(0, tokens, (2, 1), generator=generator)
    valid = (torch.arange(tokens) >= padding).unsqueeze(1)
    return proportional(loss), PageCost.of_pages(page_size, draw(st.sampled_from((2, 32)))), sinks, valid


def least_bytes(cost: PageCost, sinks: int, valid: torch.Tensor, lanes: int) -> int:
    kept = valid.sum(-1).clamp(max=sinks)
    return lanes * int(torch.ceil(kept / cost.page_size).sum()) * min(cost.nbytes.values())


@settings(max_examples=100, deadline=None)
@given(problem=problems(), error=st.sampled_from((0.5, 0.1, 0.01, 0.001)), share=st.floats(0, 1))
def test_what_is_enough_is_reached_and_no_byte_more_is_given(problem, error, share):
    losses, cost, sinks, valid = problem
    losses = {width: loss * valid for width, loss in losses.items()}
    enough = error * float(losses[0].double().sum())
    widths = allocate_beside(losses, cost, 1 << 60, sinks=sinks, valid=valid, enough=enough)[0]
    # Sums of thousands of float64 steps.
    assert total_loss(widths, losses) <= enough * (1 + 1e-9) + 1e-9
    # A budget below what that took loses more: it stops before the same steps' last one, or earlier.
    spent = pages_nbytes(widths, cost)
    least = least_bytes(cost, sinks, valid, losses[0].shape[1])
    if spent > least:
        fewer = allocate(losses, cost, least + int(share * (spent - 1 - least)), sinks=sinks, valid=valid)
        assert total_loss(fewer, losses) > enough * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), shares=st.lists(st.floats(0, 1.3), min_size=2, max_size=4))
def test_budgets_hold_sinks_stay_and_more_bytes_never_lose_more(problem, shares):
    losses, cost, sinks, valid = problem
    everything = torch.full(losses[0].shape, FULL).mul(valid)
    least = least_bytes(cost, sinks, valid, losses[0].shape[1])
    before = None
    for share in sorted(shares):
        budget = least + math.ceil(share * pages_nbytes(everything, cost))
        widths = allocate(losses, cost, budget, sinks=sinks, valid=valid)
        assert widths.shape == losses[0].shape
        assert widths.dtype == torch.int8
        assert pages_nbytes(widths, cost) <= budget
        assert not (widths * ~valid).any()
        first = valid & (valid.cumsum(-1) <= sinks)
        assert (widths[first.expand_as(widths)] > 0).all()
        if before is not None:
            assert total_loss(widths, losses) <= before + 1e-6
        before = total_loss(widths, losses)


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(st.integers(0, 60), min_size=3, max_size=3), min_size=4, max_size=4),
    budget=st.integers(5, 60),
)
def test_no_other_choice_of_as_many_bytes_loses_less(losses, budget):
    cost = PageCost(1, {2: 5, 4: 8, FULL: 15})
    table = torch.tensor(losses, dtype=torch.float32)
    curve = {width: table[None, :, column] for column, width in enumerate((0, 2, 4))}
    curve[FULL] = torch.zeros(1, 4)
    widths = allocate(curve, cost, budget, sinks=1)
    spent = pages_nbytes(widths, cost)
    best = min(
        total_loss(torch.tensor([choice]), curve)
        for choice in itertools.product((0, 2, 4, FULL), repeat=4)
        if choice[0] != EVICTED and pages_nbytes(torch.tensor([choice]), cost) <= spent
    )
    assert total_loss(widths, curve) == pytest.approx(best)


def test_a_lane_that_matters_more_gets_the_bytes():
    loss = torch.ones(2, 64)
    loss[1] *= 100
    cost = PageCost.of_pages(16, 32)
    widths = allocate(proportional(loss), cost, 4 * cost.nbytes[8] + cost.nbytes[2])
    assert (widths[1] >= 4).all()
    assert (widths[0] > 0).sum() <= 16
    assert (widths[0, :4] > 0).all()


def test_equal_losses_still_use_the_budget():
    cost = PageCost.of_pages(32, 32)
    budget = 10 * cost.nbytes[2]
    widths = allocate(proportional(torch.ones(4, 256)), cost, budget)
    assert pages_nbytes(widths, cost) > budget - cost.nbytes[2]


def test_a_budget_for_everything_keeps_everything():
    losses = proportional(torch.rand(2, 3, 50))
    widths = allocate(losses, PageCost.of_pages(32, 16), 10**9)
    assert (widths == FULL).all()


def test_widths_without_full_precision():
    cost = PageCost(4, {2: 10, 4: 16})
    loss = torch.rand(1, 10) + 1
    widths = allocate({0: loss, 2: loss / 5, 4: loss / 100}, cost, 10**6)
    assert (widths == 4).all()


@pytest.mark.parametrize("page_size", [1, 30, 32, 33])
@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "none"])
def test_costs_are_those_of_the_kernels_formats(kind: Kind, page_size: int):
    codes = [encode_pages(torch.randn(1, 1, page_size, dim).bfloat16(), kind, keys=dim == 24) for dim in (24, 40)]
    nbytes = sum(part.nbytes for code in codes for part in code.tensors()) + 4 * page_size + HOST_BYTES
    assert PageCost.of_pages(page_size, 24, 40).nbytes[FULL if kind == "none" else int(kind[3:])] == nbytes


@pytest.mark.parametrize(
    ("losses", "budget", "message"),
    [
        (
            {0: torch.ones(2, 8), 2: torch.ones(2, 8)},
            19,
            "budget of 19 bytes does not hold the sinks of every lane, which",
        ),
        ({2: torch.ones(2, 8)}, 100, "for width 0 and for widths of [2], got [2]"),
        ({0: torch.ones(2, 8), 3: torch.ones(2, 8)}, 100, "for width 0 and for widths of [2], got [0, 3]"),
        ({0: torch.ones(2, 8), 2: torch.ones(2, 7)}, 100, "different shapes: [(2, 7), (2, 8)]"),
        ({0: torch.ones(2, 8), 2: -torch.ones(2, 8)}, 100, "finite and not negative"),
        ({0: torch.full((2, 8), torch.nan), 2: torch.ones(2, 8)}, 100, "finite and not negative"),
        ({0: torch.ones(2, 8)}, 100, "at least one width beside eviction"),
    ],
)
def test_what_cannot_be_allocated_is_refused(losses, budget, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(losses, PageCost(4, {2: 10}), budget)


@pytest.mark.parametrize(("page_size", "nbytes"), [(0, {2: 1}), (4, {}), (4, {2: 0}), (4, {0: 3})])
def test_costs_are_positive(page_size, nbytes):
    with pytest.raises(ValueError, match=r"at least one|positive"):
        PageCost(page_size, nbytes)


def test_the_prompt_of_the_bundled_model_takes_no_time():
    losses = proportional(torch.rand(4, 4, 8192))
    cost = PageCost.of_pages(32, 32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        allocate(losses, cost, 4 * 4 * 8192 * 16)
        times.append(time.perf_counter() - start)
    # A tenth of this is usual; a machine may be busy.
    assert min(times) < 0.5
