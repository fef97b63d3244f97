"""The GPU check itself, on whatever there is: its references, its verdicts, its byte counts, its report."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pikv_hf.eval.gpu import (
    attention_speed,
    check_attention,
    check_pages,
    command,
    session,
    sweep,
    targets,
    timing,
)
from pikv_hf.eval.gpu import (
    run_report as report,
)
from pikv_hf.eval.gpu.arena import Arena, pages_bytes, random_pages
from pikv_hf.eval.gpu.attention_speed import AttentionSpeed, attention_speeds, random_problem
from pikv_hf.eval.gpu.check_attention import AttentionCase, attention_plan, attention_plans
from pikv_hf.eval.gpu.check_pages import page_plans
from pikv_hf.eval.gpu.checks import FLOOR, Check, Outcome, Place, Plan, bound_of, max_difference, run_checks, why_red
from pikv_hf.eval.gpu.copy_speed import Bench, as_row, copy_speed
from pikv_hf.eval.gpu.dense import dense_speed
from pikv_hf.eval.gpu.geometry import GEOMETRIES, Geometry, Shape, attention_cases, scattered_layout
from pikv_hf.eval.gpu.page_speed import Sizes
from pikv_hf.eval.gpu.pools import ragged_layout, sealed_pool
from pikv_hf.eval.gpu.references import attended, gathered
from pikv_hf.eval.gpu.time_limit import NO_TIME, Budget
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.page_codes import KINDS, PageCodes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
#: The kernels themselves: compiled where there is a GPU, else run by Triton's interpreter.
PLACE = Place(torch.device("cuda" if ON_GPU else "cpu"), "triton" if ON_GPU else "interpret")
TORCH = Place(CPU, "torch")
TINY = Geometry("tiny", 4, 2, 16, 24)


def forever() -> Budget:
    return Budget(1.0, clock=lambda: 0.0)


def tiny_case(**changes: Any) -> AttentionCase:
    return dataclasses.replace(
        AttentionCase("int4", "int4", torch.float32, dim=16, value_dim=32, group=2, batch=4, columns=4, page_size=8),
        **changes,
    )


KERNEL = check_attention.paged_decode_attention


def in_single(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Attend in float32, whatever the query's dtype: torch's own bf16 rounds logits, which the kernels do not."""
    return KERNEL(query.float(), *args, **kwargs)


@pytest.fixture
def _single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_attention, "paged_decode_attention", in_single)
    monkeypatch.setattr(attention_speed, "paged_decode_attention", in_single)


def checked(plans: list[Plan], place: Place) -> list[Check]:
    results = list(run_checks(plans, place, forever()))
    assert all(isinstance(result, Check) for result in results)
    return [result for result in results if isinstance(result, Check)]


def once(call: Callable[[], Any], most: int = 1) -> Timing:
    """Time a call on the processor, once however often it is asked for."""
    started = time.perf_counter()
    call()
    return Timing.of([1000 * (time.perf_counter() - started)])


def bench(size: int = 1 << 22) -> Bench:
    return Bench(CPU, "torch", Arena(size, CPU), once, copy_gb_per_s=10.0)


# The kernels, at sizes that the interpreter is quick with.

ATTENTION = [
    *(attention_plan("ragged rows", tiny_case(keys=kind, values=kind)) for kind in KINDS),
    attention_plan("half", tiny_case(dtype=torch.float16, keys="int8", values="int2")),
    attention_plan("latent", tiny_case(key_rank=16, value_rank=16, page_lse=True)),
    attention_plan("softcap", tiny_case(softcap=2.0)),
]
HALF, SINGLE = torch.float16, torch.float32
TINY_PAGES = {"dim": 16, "page_size": 8}
OTHERS = [
    *(
        Plan(
            "gather_pages",
            f"{keys}",
            HALF,
            kind,
            functools.partial(check_pages.gather_outcomes, kind, HALF, keys=keys, rank=rank, **TINY_PAGES),
        )
        for kind in KINDS
        for keys, rank in ((True, 4), (False, 0))
    ),
    *(
        Plan(
            "encode_pages",
            f"{keys}",
            SINGLE,
            kind,
            functools.partial(check_pages.seal_outcomes, kind, SINGLE, keys=keys, pages=8, **TINY_PAGES),
        )
        for kind in KINDS[1:]
        for keys in (True, False)
    ),
    *(
        Plan("page_scores", bounds, HALF, "-", functools.partial(check_pages.score_outcomes, bounds, HALF, dim=16))
        for bounds in check_pages.BOUNDS
    ),
    Plan("merge_partials", "sinks", SINGLE, "-", functools.partial(check_pages.merge_outcomes, 3, sinks=True, dim=16)),
    Plan("append_tokens", "", HALF, "-", functools.partial(check_pages.append_outcomes, HALF, dim=16)),
]


@pytest.mark.parametrize("plan", [*ATTENTION, *OTHERS], ids=lambda plan: f"{plan.operation}-{plan.kind}-{plan.case}")
def test_kernels_pass_their_checks(plan: Plan) -> None:
    checks = checked([plan], PLACE)
    assert checks
    assert [check for check in checks if not check.ok] == []
    assert all(check.max_error is not None and math.isfinite(check.max_error) for check in checks)


@pytest.mark.usefixtures("_single")
def test_torch_passes_every_check_of_a_gpu() -> None:
    """The checks are sound, in all dtypes, kinds and geometries that a GPU is asked for."""
    plans = [plan for plan in [*attention_plans(), *page_plans()] if plan.case != "long rows"]
    assert [check for check in checked(plans, TORCH) if not check.ok] == []


def test_every_kernel_kind_and_dtype_is_checked() -> None:
    asked = {(plan.operation, plan.kind, plan.dtype) for plan in [*attention_plans(), *page_plans()]}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for operation in ("paged_decode_attention", "gather_pages", "encode_pages"):
        kinds = KINDS[1:] if operation == "encode_pages" else KINDS
        assert {(operation, kind, dtype) for kind in kinds for dtype in dtypes} <= asked
    assert {("page_scores", "-", dtype) for dtype in dtypes} <= asked
    assert {("append_tokens", "-", dtype) for dtype in dtypes} <= asked
    assert ("merge_partials", "-", torch.float32) in asked
    latent = {plan.kind for plan in attention_plans() if plan.case == "latent"}
    assert latent == set(KINDS)


# References.


def dense_pool(seed: int = 0) -> tuple[torch.Tensor, PageCodes, PageCodes, Any]:
    generator = torch.Generator().manual_seed(seed)
    layout = scattered_layout(2, 3, CPU)
    layout = dataclasses.replace(layout, counts=torch.full((6,), 8, dtype=torch.int32))
    keys = sealed_pool("int8", 2, 16, 8, layout, torch.float32, generator, keys=True)
    values = sealed_pool("none", 2, 24, 8, layout, torch.float32, generator, keys=False)
    return torch.randn(2, 4, 16, generator=generator), keys, values, layout


def test_reference_attention_is_torchs_on_full_pages() -> None:
    query, keys, values, layout = dense_pool()
    decoded = [decode_pages(codes, torch.float32).double() for codes in (keys, values)]
    dense = [tokens[:, layout.table.long()].transpose(0, 1).flatten(2, 3) for tokens in decoded]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().unsqueeze(2), *dense, scale=0.3, enable_gqa=True
    ).squeeze(2)
    out, lse, page_lse = attended(query, keys, values, layout, 0.3, None, torch.float64)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(page_lse.logsumexp(2), lse)
    torch.testing.assert_close(gathered(keys, layout, torch.float64), dense[0])


def test_reference_attention_sees_tokens_alone() -> None:
    """Slots without a token, pages that no row reads and stray table entries change nothing: all of them are poison."""
    generator = torch.Generator().manual_seed(1)
    layout = ragged_layout(4, 4, 8, generator)
    assert layout.lengths.tolist() == [4, 0, 1, 3]
    assert layout.table[1].tolist() == [10**8, -7, 10**8, -7]
    assert layout.table[0, 0] == layout.table[3, 0]
    pools = [
        sealed_pool("none", 2, 8, 8, layout, torch.float32, generator, keys=keys, rank=4) for keys in (True, False)
    ]
    assert all(pool.codes.isnan().any() and pool.latent.isnan().any() for pool in pools)
    query = torch.randn(4, 4, 12, generator=generator)
    out, lse, _ = attended(query, *pools, layout, 0.3, 5.0, torch.float64)
    assert out.isfinite().all()
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    for row in (0, 2, 3):
        for head in range(4):
            seen = [(int(page), slot) for page in layout.pages(row) for slot in range(int(layout.counts[page]))]
            keys, values = (
                torch.stack([torch.cat([pool.codes[head // 2, p, s], pool.latent[head // 2, p, s]]) for p, s in seen])
                for pool in pools
            )
            logits = 5 * torch.tanh(keys.double() @ query[row, head].double() * 0.3 / 5)
            torch.testing.assert_close(out[row, head], torch.softmax(logits, 0) @ values.double())
            torch.testing.assert_close(lse[row, head], logits.logsumexp(0))


# Verdicts.


def outcome(result: list[float], exact: list[float], yardstick: list[float], **options: float) -> Outcome:
    parts = (torch.tensor(numbers, dtype=torch.float64) for numbers in (result, exact, yardstick))
    return Outcome("out", *parts, **options)


def test_bound_is_twice_torchs_error_and_a_floor() -> None:
    assert bound_of(outcome([], [1.0, -4.0], [1.5, -4.25])) == 2 * 0.5 + 4 * FLOOR
    assert bound_of(outcome([], [0.25], [0.25], unit=1.0)) == FLOOR
    assert bound_of(outcome([], [3.0, -math.inf], [3.0, -math.inf], floor=0.0)) == 0.0
    assert bound_of(outcome([], [0.0], [0.5], factor=1.02)) == 0.51


@pytest.mark.parametrize(
    ("result", "error"),
    [([1.0, -math.inf], 0.0), ([1.5, -math.inf], 0.5), ([math.nan, -math.inf], math.inf), ([1.0, 0.0], math.inf)],
)
def test_infinities_have_to_agree(result: list[float], error: float) -> None:
    assert max_difference(torch.tensor(result), torch.tensor([1.0, -math.inf])) == error
    assert max_difference(torch.tensor(result[:1]), torch.tensor([1.0, -math.inf])) == math.inf


def plan_of(result: list[float], operation: str = "gather_pages", kind: str = "int8") -> Plan:
    return Plan(operation, "case", torch.bfloat16, kind, lambda place: [outcome(result, [1.0], [1.0])])


def broken(place: Place) -> list[Outcome]:
    raise RuntimeError("no such instruction\nand a long listing")


def test_a_red_check_does_not_stop_the_others() -> None:
    plans = [plan_of([2.0]), plan_of([math.nan]), dataclasses.replace(plan_of([1.0]), run=broken), plan_of([1.0])]
    wrong, nan, raised, right = checked(plans, TORCH)
    assert (wrong.ok, wrong.max_error, wrong.bound) == (False, 1.0, FLOOR)
    assert (nan.ok, nan.max_error) == (False, None)
    assert "NaN" in nan.note
    assert (raised.ok, raised.note) == (False, "RuntimeError: no such instruction")
    assert right == Check("gather_pages", "case: out", "bfloat16", "int8", 0.0, FLOOR, True)


def test_a_red_kernel_has_no_figures() -> None:
    red = {("paged_decode_attention", "int8/int4"), ("page_scores", "-")}
    assert "int8/int4" in why_red(red, "paged_decode_attention", "int8")
    assert why_red(red, "paged_decode_attention", "int4")
    assert why_red(red, "paged_decode_attention", "-")
    assert why_red(red, "page_scores", "-")
    assert not why_red(red, "paged_decode_attention", "none")
    assert not why_red(red, "gather_pages", "int8")


def spoiled(change: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the torch operation, its inputs or results changed."""

    def call(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return change(KERNEL, *args, **kwargs)

    return call


MISTAKES: dict[str, Callable[..., Any]] = {
    "reads slots without a token": lambda kernel, q, k, v, table, lengths, counts, *rest, **options: kernel(
        q, k, v, table, lengths, torch.full_like(counts, k.page_size), *rest, **options
    ),
    "leaves the last page out": lambda kernel, q, k, v, table, lengths, *rest, **options: kernel(
        q, k, v, table, (lengths - 1).clamp_min(0), *rest, **options
    ),
    "ignores the soft cap": lambda kernel, *args, **options: kernel(*args[:7], None, **options),
    "rounds its query": lambda kernel, q, *rest, **options: kernel((q * 2**8).round() / 2**8, *rest, **options),
    "returns a log-sum-exp of base 2": lambda kernel, *args, **options: (
        (result := kernel(*args, **options))[0],
        result[1] / math.log(2),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", ["none", "int4"])
def test_mistakes_of_a_kernel_are_red(mistake: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(keys=kind, values=kind, softcap=1.0)
    assert all(check.ok for check in checked([attention_plan("right", case)], TORCH))
    monkeypatch.setattr(check_attention, "paged_decode_attention", spoiled(MISTAKES[mistake]))
    assert not all(check.ok for check in checked([attention_plan("wrong", case)], TORCH))


# Budget.


class FakeClock:
    """A clock that advances by one second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_what_does_not_fit_in_the_time_is_named() -> None:
    plans = [plan_of([1.0]) for _ in range(5)]
    # The budget reads the clock when it begins, then once per plan: 1, 2 seconds are spent, 3 are too many.
    results = list(run_checks(plans, TORCH, Budget(3.0, FakeClock())))
    assert [isinstance(result, Check) for result in results] == [True, True, False, False, False]
    part = report.checks_part(results)
    assert (part["passed"], part["failed"]) == (2, 0)
    assert part["not_run"] == ["gather_pages, case, bfloat16, int8"] * 3


@pytest.mark.usefixtures("_single")
def test_measurements_after_the_time_are_listed() -> None:
    cases = [(Shape(TINY, 64, 1), "none"), (Shape(TINY, 64, 2), "none")]
    speeds = list(attention_speeds(bench(), cases, set(), Budget(2.0, FakeClock())))
    assert [speed.note for speed in speeds] == ["", NO_TIME]
    assert report.not_run([as_row(speed) for speed in speeds]) == ["tiny, none, 64, 2"]


# Bytes.


def test_bytes_of_pages_by_hand() -> None:
    heads, pages, size, dim = 2, 3, 32, 64
    each = {
        # Per page and head: codes, spread; a float16 floor, 4 int16 channels and 4 columns of 16 bytes for keys, a
        # byte of floor for values.
        ("none", True): 32 * 64 * 2,
        ("none", False): 32 * 64 * 2,
        ("fp8", True): 32 * 64 + 64,
        ("fp8", False): 32 * 64 + 64,
        ("int8", True): 32 * 64 + 64 + 128 + 8 + 64,
        ("int8", False): 32 * 64 + 64 + 64,
        ("int4", True): 16 * 64 + 64 + 128 + 8 + 64,
        ("int4", False): 16 * 64 + 64 + 64,
        ("int2", True): 8 * 64 + 64 + 128 + 8 + 64,
        ("int2", False): 8 * 64 + 64 + 64,
    }
    arena = Arena(1 << 20, CPU)
    for (kind, keys), size_of_one in each.items():
        arena.reset()
        codes = random_pages(arena, kind, heads, pages, size, dim, keys=keys)
        assert pages_bytes(kind, heads, pages, size, dim, keys=keys) == heads * pages * size_of_one
        assert sum(part.nbytes for part in codes.tensors()) == heads * pages * size_of_one
        assert decode_pages(codes, torch.float32).isfinite().all()


def test_bytes_of_a_case_by_hand() -> None:
    shape = Shape(GEOMETRIES[0], 32768, 8)
    pages = 8 * 1024
    assert shape.dense_bytes == 2 * 8 * 4 * 32768 * 256
    # Keys and values of one page and head, then a table entry and a count per page, and 8 lengths.
    assert shape.read_bytes("none") == pages * 4 * 2 * 32 * 128 * 2 + pages * 8 + 32
    assert shape.read_bytes("int4") == pages * 4 * (2 * 16 * 128 + 2 * 128 + 256 + 128 + 8 + 64) + pages * 8 + 32
    problem = random_problem(bench(), Shape(TINY, 64, 2), "int8")
    held = [*problem.keys.tensors(), *problem.values.tensors(), *dataclasses.astuple(problem.layout)]
    assert Shape(TINY, 64, 2).read_bytes("int8") == sum(part.nbytes for part in held)
    assert sorted(problem.layout.table.flatten().tolist()) == list(range(4))


def test_an_arena_hands_out_what_it_has() -> None:
    arena = Arena(1024, CPU)
    first, second = arena.take(3, 5, dtype=torch.float16), arena.take(64, dtype=torch.int32)
    assert second.data_ptr() - first.data_ptr() == 256
    with pytest.raises(ValueError, match=r"600 bytes .* 1024, 512"):
        arena.take(600, dtype=torch.uint8)
    arena.reset()
    assert arena.take(1024, dtype=torch.uint8).data_ptr() == first.data_ptr()


# Measurements.


@pytest.mark.usefixtures("_single")
def test_figures_follow_from_bytes_and_milliseconds() -> None:
    fixed = dataclasses.replace(bench(), stopwatch=lambda call, most=0: (call(), Timing(1.0, 2.0, 3.0, 9))[1])
    [speed] = attention_speeds(fixed, [(Shape(TINY, 64, 2), "int4")], set(), forever())
    assert speed.gb_per_s == pytest.approx(speed.bytes_read / 2e-3 / 1e9)
    assert speed.copy_share == pytest.approx(speed.gb_per_s / 10.0)
    assert (speed.sdpa_ms, speed.sdpa_ratio) == (2.0, 1.0)
    assert speed.bound > speed.max_error > 0
    row = as_row(speed)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["calls"]) == (1.0, 2.0, 3.0, 9)
    copied = copy_speed(fixed.arena, fixed.stopwatch, most=1000)
    assert (copied.bytes_copied, copied.gb_per_s) == (1000, pytest.approx(2000 / 2e-3 / 1e9))


def test_a_result_that_is_wrong_at_size_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        out, lse = in_single(query, *args, **kwargs)
        return out * 1.1, lse

    monkeypatch.setattr(attention_speed, "paged_decode_attention", wrong)
    [speed] = attention_speeds(bench(), [(Shape(TINY, 64, 2), "none")], set(), forever())
    assert (speed.failed, speed.timing, speed.copy_share) == (True, None, None)
    assert speed.note.startswith("red at this size")


@pytest.mark.usefixtures("_single")
def test_cases_too_large_or_red_are_explained() -> None:
    cases = [(Shape(TINY, 1 << 20, 32), "none"), (Shape(TINY, 64, 1), "int8")]
    large, red = attention_speeds(bench(), cases, {("paged_decode_attention", "int8")}, forever())
    assert (large.failed, large.timing) == (False, None)
    assert large.note == "needs 5 GB, 0 GB are free"
    assert (red.failed, red.note) == (True, "a check of paged_decode_attention on int8 pages is red")
    assert dense_speed(bench(), cases[0][0]).tried == {"all": "needs 5 GB, 0 GB are free"}


def test_dense_attention_names_its_fastest_backend() -> None:
    speed = dense_speed(bench(), Shape(TINY, 64, 2))
    ran = {name: spent for name, spent in speed.tried.items() if isinstance(spent, float)}
    assert speed.backend == min(ran, key=ran.get)
    assert "CUDNN_ATTENTION" not in ran
    assert len(speed.tried) == 4


class FakeEvent:
    """A CUDA event of a device on which everything takes 2 ms."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None: ...

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 2.0


def test_calls_are_timed_by_events_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called: list[int] = []
    stopwatch = timing.CudaStopwatch(CPU)
    # 0.3 seconds of calls of 2 ms would be 150.
    assert stopwatch(lambda: called.append(FakeEvent.made)) == Timing(2.0, 2.0, 2.0, 60)
    assert called[0] == 0
    assert len(called) == 1 + 3 + 60
    assert stopwatch(lambda: None, 3).calls == 3


def test_facts_of_a_gpu_need_no_driver_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="NVIDIA H200", total_memory=7, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", "/nonexistent")
    facts = report.gpu_facts(torch.device("cuda", 0))
    assert (facts["name"], facts["driver"], facts["multiprocessors"]) == ("NVIDIA H200", None, 132)
    assert report.slug(facts["name"]) == "nvidia-h200"


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(2.0, 3.0, 5.0, 5)


def test_cases_with_a_target_come_first() -> None:
    cases = list(attention_cases())
    assert len(cases) == len(set(cases)) == 4 * 9 * 3 + 9 * 2
    aimed = [shape.tokens >= 32768 and shape.batch >= 8 for shape, _ in cases]
    assert aimed == sorted(aimed, reverse=True)
    assert cases[0] == (Shape(GEOMETRIES[0], 32768, 8), "none")
    assert {shape.tokens for shape, _ in cases} == {8192, 32768, 131072}
    assert [kind for _, kind in attention_cases(quick=True)] == ["none", "int8", "int4"]


def test_a_sweep_keeps_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, int]] = []

    def tuned(*args: Any, tuning: dict[str, int] | None = None, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        launched.append(tuning or {})
        stages = (tuning or {}).get("num_stages", 0)
        if stages == 4:
            raise RuntimeError("out of resource: shared memory")
        out, lse = in_single(*args, **kwargs)
        return (out * 1.1 if stages == 3 else out), lse

    monkeypatch.setattr(attention_speed, "paged_decode_attention", tuned)
    times = iter([4.0, 3.0, 2.0, 5.0, 2.5, 1.0])
    timed = dataclasses.replace(bench(), stopwatch=lambda call, most: Timing.of([next(times)]))
    steps = ({"num_stages": (1, 2, 3, 4, 5)}, {"splits": (6, 7)})
    case = (Shape(TINY, 64, 2), "int8")
    [row] = sweep.sweep_rows(timed, set(), forever(), [case], steps)
    assert (row.default_ms, row.best_ms, row.gain) == (4.0, 1.0, 4.0)
    assert row.best == {"num_stages": 2, "splits": 7}
    assert [trial.p50_ms for trial in row.trials] == [3.0, 2.0, None, None, 5.0, 2.5, 1.0]
    assert [trial.tuning for trial in row.trials] == launched[1:]
    assert row.trials[2].note.startswith("wrong: error")
    assert row.trials[3].note == "RuntimeError: out of resource: shared memory"
    [red] = sweep.sweep_rows(timed, {("paged_decode_attention", "int8")}, forever(), [case], steps)
    assert (red.trials, "is red" in red.note) == ((), True)


def test_a_sweep_tries_what_the_kernel_takes() -> None:
    source = (ROOT / "kernels" / "triton_paged_decode_attention.py").read_text()
    [tunable] = (line for line in source.splitlines() if line.startswith("TUNABLE ="))
    assert all(f'"{name}"' in tunable for step in sweep.STEPS for name in step)


# Targets.


def speed_of(batch: int, tokens: int, kind: str = "int4", **figures: Any) -> AttentionSpeed:
    return AttentionSpeed("g", 8, 4, 128, 128, tokens, batch, kind, 1, **figures)  # type: ignore[arg-type]


def test_targets_are_for_long_rows_and_batches() -> None:
    [share] = [t for t in targets.TARGETS if (t.kind, t.figure) == ("int4", "copy_share")]
    low = [
        speed_of(1, 131072, copy_share=0.1),
        speed_of(8, 8192, copy_share=0.1),
        speed_of(8, 32768, "int8", copy_share=0.1),
    ]
    good = [speed_of(8, 32768, copy_share=0.7), speed_of(32, 131072, copy_share=0.9)]
    large = speed_of(32, 32768, note="needs 200 GB")
    judged = targets.judged(share, [*low, *good, large])
    assert judged["met"] is True
    assert judged["worst"] == {"case": "g, 8 x 32768 tokens", "copy_share": 0.7}
    assert judged["best"] == {"case": "g, 32 x 131072 tokens", "copy_share": 0.9}
    assert (judged["missed_by"], judged["without_figure"]) == ([], ["g, 32 x 32768 tokens"])
    missed = targets.judged(share, [*good, speed_of(8, 131072, copy_share=0.69)])
    assert (missed["met"], missed["missed_by"]) == (False, ["g, 8 x 131072 tokens"])
    assert targets.judged(share, [*low, large])["met"] is None
    failed = targets.judged(share, [*good, dataclasses.replace(large, failed=True)])
    assert (failed["met"], failed["missed_by"]) == (False, ["g, 32 x 32768 tokens"])


def test_targets_are_those_of_the_design() -> None:
    assert [(t.kind, t.figure, t.least) for t in targets.TARGETS] == [
        ("none", "copy_share", 0.85),
        ("int8", "copy_share", 0.80),
        ("int4", "copy_share", 0.70),
        ("int4", "sdpa_ratio", 3.0),
    ]


# The whole.


def run_tiny(
    folder: Path, plans: list[Plan], budget: Budget | None = None, **changes: Any
) -> tuple[bool, dict[str, Any]]:
    cases = [(Shape(TINY, tokens, batch), kind) for tokens, batch in ((64, 2), (32768, 8)) for kind in ("none", "int4")]
    agenda = session.Agenda(plans, cases, Sizes(1, 64, 1, 128), sweep=False)
    writer = report.Report(folder, {"name": "NVIDIA Test (1)"})
    run = session.Session(writer, TORCH, budget or forever())
    wrong = run.run(agenda, lambda: 1 << 26, lambda: once)
    return wrong, json.loads(writer.path.read_text())


@pytest.mark.usefixtures("_single")
def test_a_run_writes_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, found = run_tiny(tmp_path / "new", [attention_plan("ragged rows", tiny_case()), plan_of([1.0])])
    assert not wrong
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["gpu-check-nvidia-test-1.json"]
    assert found["complete"] is True
    assert {"command", "date", "commit", "versions", "gpu", "definitions", "seconds"} <= found.keys()
    assert found["correctness"]["passed"] == 3
    assert {"operation", "name", "dtype", "kind", "max_error", "bound", "ok"} <= found["correctness"]["checks"][
        0
    ].keys()
    # Cases with a target are measured first, whatever their place in the agenda.
    assert [(row["tokens"], row["kind"]) for row in found["attention"]] == [
        (32768, "none"),
        (32768, "int4"),
        (64, "none"),
        (64, "int4"),
    ]
    assert all(row["gb_per_s"] > 0 and row["sdpa_ratio"] > 0 for row in found["attention"])
    assert [row["operation"] for row in found["other_kernels"]] == ["encode_pages"] * 8 + ["gather_pages"] * 5 + [
        "page_scores",
        "append_tokens",
        "merge_partials",
    ]
    assert all(row["note"] == "" and row["bytes_moved"] > 0 for row in found["other_kernels"])
    assert found["copy_bandwidth"]["gb_per_s"] > 0
    assert [target["met"] is None for target in found["targets"]] == [False, True, False, False]
    assert found["not_run"] == []
    out = capsys.readouterr().out
    assert "ok  paged_decode_attention  float32" in out
    assert "8 x 32768" in out


@pytest.mark.usefixtures("_single")
def test_a_red_check_fails_the_run_and_silences_its_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, found = run_tiny(tmp_path, [plan_of([2.0], "paged_decode_attention", "int4"), plan_of([1.0])])
    assert wrong
    assert (found["correctness"]["failed"], found["correctness"]["passed"]) == (1, 1)
    silent = [row for row in found["attention"] if row["kind"] == "int4"]
    assert all(row["p50_ms"] is row["gb_per_s"] is None and "is red" in row["note"] for row in silent)
    assert all(row["gb_per_s"] > 0 for row in found["attention"] if row["kind"] == "none")
    assert "RED      int4, case: out: error 1, bound" in capsys.readouterr().out


@pytest.mark.usefixtures("_single")
def test_a_run_without_time_names_everything(tmp_path: Path) -> None:
    wrong, found = run_tiny(tmp_path, [plan_of([1.0])], Budget(0.0))
    # Checks that were not made are no green ones.
    assert wrong
    assert found["correctness"]["not_run"] == ["gather_pages, case, bfloat16, int8"]
    assert len(found["not_run"]) == 4 + 16
    assert all(target["met"] is None for target in found["targets"])


def test_an_unusable_device_leaves_the_checks(tmp_path: Path) -> None:
    def illegal() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    writer = report.Report(tmp_path, {"name": "x"})
    agenda = session.Agenda([plan_of([1.0])], [], Sizes(), sweep=False)
    assert session.Session(writer, TORCH, forever()).run(agenda, illegal, lambda: once)
    found = json.loads(writer.path.read_text())
    assert found["correctness"]["passed"] == 1
    assert found["complete"] is False
    assert "illegal memory access" in found["measurements"]


# The command.

WITHOUT = (
    "typer",
    "rich",
    "kvpress",
    "transformers",
    "accelerate",
    "datasets",
    "pandas",
    "matplotlib",
    "scipy",
    "yaml",
)
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({WITHOUT!r}))
import pikv_hf.eval.gpu as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"pikv_hf.eval.gpu.{{module.name}}")
sys.exit(sys.modules["pikv_hf.eval.gpu.command"].main(["--quick"]))
"""


def run_without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("how", [("-m", "pikv_hf.eval.gpu", "--output", "/nonexistent"), ("-c", IMPORT_ALL)])
def test_without_a_gpu_one_line_says_so(how: tuple[str, ...]) -> None:
    """Run from the checkout, the second time with torch, Triton and NumPy alone."""
    result = run_without_gpu(sys.executable, "-P", *how)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("gpu-check: an NVIDIA GPU is needed")
    assert result.stderr.count("\n") == 1


def test_make_needs_no_environment() -> None:
    result = run_without_gpu("make", "-n", "gpu-check", "VENV=nowhere", "FLAGS=--sweep")
    assert result.returncode == 0, result.stderr
    assert "PYTHONPATH=src python3 -P -m pikv_hf.eval.gpu" in result.stdout
    assert "--output eval/results/gpu/ --sweep" in " ".join(result.stdout.split())
    assert "pip" not in result.stdout


@pytest.mark.parametrize(("failed", "status"), [(False, 0), (True, 1)])
def test_exit_status(failed: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Path, float, bool, bool]] = []

    def run(folder: Path, budget: Budget, *, quick: bool, sweep: bool) -> bool:
        called.append((folder, budget.seconds, quick, sweep))
        return failed

    monkeypatch.setattr(command, "missing", lambda: "")
    monkeypatch.setattr(session, "run", run)
    assert command.main(["--output", str(tmp_path), "--budget-seconds", "9", "--sweep"]) == status
    assert called == [(tmp_path, 9.0, False, True)]
