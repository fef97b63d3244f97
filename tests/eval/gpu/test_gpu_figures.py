"""The figures of the GPU check: time limit, bytes counted by hand, measurements and targets."""

import dataclasses
import types
from typing import Any

import pytest
import torch
from tiny_gpu_check import CPU, ROOT, TINY, TINY_LATENTS, TORCH, FakeClock, bench, forever, in_single, plan_of

from pikv_hf.eval.gpu import (
    attention_speed,
    console,
    sweep,
    targets,
    timing,
)
from pikv_hf.eval.gpu import (
    run_report as report,
)
from pikv_hf.eval.gpu.arena import Arena, pages_bytes, random_pages
from pikv_hf.eval.gpu.attention_speed import AttentionSpeed, attention_speeds, random_problem
from pikv_hf.eval.gpu.checks import Check, run_checks
from pikv_hf.eval.gpu.copy_speed import as_row, copy_speed
from pikv_hf.eval.gpu.dense import dense_speed
from pikv_hf.eval.gpu.geometry import GEOMETRIES, Shape, attention_cases
from pikv_hf.eval.gpu.latent_speed import DEEPSEEK_V3, LatentCase, latent_cases, latent_speeds, random_latents
from pikv_hf.eval.gpu.time_limit import NO_TIME, TimeLimit
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels.decode_pages import decode_pages

# The time limit.


def test_what_does_not_fit_in_the_time_is_named() -> None:
    plans = [plan_of([1.0]) for _ in range(5)]
    # The limit reads the clock when it begins, then once per plan: 1, 2 seconds are spent, 3 are too many.
    results = list(run_checks(plans, TORCH, TimeLimit(3.0, FakeClock())))
    assert [isinstance(result, Check) for result in results] == [True, True, False, False, False]
    part = report.checks_part(results)
    assert (part["passed"], part["failed"]) == (2, 0)
    assert part["not_run"] == ["gather_pages, case, bfloat16, int8"] * 3


@pytest.mark.usefixtures("single_precision")
def test_measurements_after_the_time_are_listed() -> None:
    cases = [(Shape(TINY, 64, 1), "none"), (Shape(TINY, 64, 2), "none")]
    speeds = list(attention_speeds(bench(), cases, set(), TimeLimit(2.0, FakeClock())))
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
    held = [*problem.keys.tensors(), *problem.values.tensors(), *dataclasses.astuple(problem.page_table)]
    assert Shape(TINY, 64, 2).read_bytes("int8") == sum(part.nbytes for part in held)
    assert sorted(problem.page_table.entries.flatten().tolist()) == list(range(4))


def test_an_arena_hands_out_what_it_has() -> None:
    arena = Arena(1024, CPU)
    first, second = arena.take(3, 5, dtype=torch.float16), arena.take(64, dtype=torch.int32)
    assert second.data_ptr() - first.data_ptr() == 256
    with pytest.raises(ValueError, match=r"600 bytes .* 1024, 512"):
        arena.take(600, dtype=torch.uint8)
    arena.reset()
    assert arena.take(1024, dtype=torch.uint8).data_ptr() == first.data_ptr()


# Measurements.


@pytest.mark.usefixtures("single_precision")
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


def test_bytes_and_operations_of_latents_by_hand() -> None:
    case = LatentCase(*DEEPSEEK_V3, 32768, 8, "none")
    pages = 8 * 1024
    assert case.packed_bytes == pages * 32 * (512 + 64) * 2
    assert case.read_bytes == case.packed_bytes + pages * 8 + 32
    assert case.operations == 2 * 8 * 128 * 32768 * (512 + 64 + 512)
    tiny = LatentCase(*TINY_LATENTS, 64, 2, "int4")
    problem = random_latents(bench(), tiny)
    held = [*problem.keys.tensors(), *problem.values.tensors(), *dataclasses.astuple(problem.page_table)]
    assert tiny.read_bytes == sum(part.nbytes for part in held)
    assert [case.kind for case in latent_cases(quick=True)] == ["none", "int8", "int4"]
    assert len(list(latent_cases())) == 9


@pytest.mark.usefixtures("single_precision")
def test_figures_of_latents_follow_from_milliseconds() -> None:
    fixed = dataclasses.replace(bench(), stopwatch=lambda call, most=0: (call(), Timing(1.0, 2.0, 3.0, 9))[1])
    cases = [LatentCase(*TINY_LATENTS, 64, 2, kind) for kind in ("none", "int8", "int4")]
    speeds = list(latent_speeds(fixed, cases, {("absorbed_decode_attention", "int8")}, forever()))
    assert [speed.kind for speed in speeds] == ["none", "int8/none", "int4/none"]
    assert (speeds[1].failed, speeds[1].timing) == (True, None)
    for case, speed in zip(cases[::2], speeds[::2], strict=True):
        assert speed.note == ""
        assert speed.tflops == pytest.approx(case.operations / 2e-3 / 1e12)
        assert speed.gb_per_s == pytest.approx(case.read_bytes / 2e-3 / 1e9)
        assert (speed.matmul_ms, speed.matmul_ratio, speed.sdpa_ms, speed.sdpa_ratio) == (2.0, 1.0, 2.0, 1.0)
        assert speed.bound > speed.max_error > 0
        assert "1.00x" in console.latent_line(speed)
    assert "is red" in console.latent_line(speeds[1])
    large = LatentCase(*TINY_LATENTS, 1 << 20, 32, "none")
    [untimed] = latent_speeds(bench(), [large], set(), forever())
    assert (untimed.failed, untimed.note.startswith("needs")) == (False, True)


def test_a_result_that_is_wrong_at_size_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        out, lse = in_single(query, *args, **kwargs)
        return out * 1.1, lse

    monkeypatch.setattr(attention_speed, "paged_decode_attention", wrong)
    [speed] = attention_speeds(bench(), [(Shape(TINY, 64, 2), "none")], set(), forever())
    assert (speed.failed, speed.timing, speed.copy_share) == (True, None, None)
    assert speed.note.startswith("red at this size")


@pytest.mark.usefixtures("single_precision")
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
    tunable: list[str] = []
    for module, steps in (("paged", sweep.STEPS), ("absorbed", sweep.LATENT_STEPS)):
        source = (ROOT / "kernels" / f"triton_{module}_decode_attention.py").read_text()
        tunable += (line for line in source.splitlines() if "TUNABLE = (" in line)
        assert all(f'"{name}"' in " ".join(tunable) for step in steps for name in step)
    assert len(tunable) == 2
    [row] = sweep.latent_sweep_rows(
        bench(),
        {("absorbed_decode_attention", "none")},
        forever(),
        [LatentCase(*TINY_LATENTS, 64, 2, "none")],
    )
    assert (row.trials, row.note) == ((), "a check of absorbed_decode_attention on none pages is red")


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
