"""Try other launch parameters of `paged_decode_attention`, beside those it chooses by itself."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from pikv_hf.eval.gpu.attention_speed import OPERATION, Problem, lane_error, random_problem
from pikv_hf.eval.gpu.check_attention import LATENT_OPERATION
from pikv_hf.eval.gpu.checks import reason, why_red
from pikv_hf.eval.gpu.copy_speed import Bench, obstacle
from pikv_hf.eval.gpu.geometry import GEOMETRIES, Shape
from pikv_hf.eval.gpu.latent_speed import LatentCase, latent_cases, random_latents
from pikv_hf.eval.gpu.time_limit import NO_TIME, TimeLimit
from pikv_hf.kernels.page_codes import Kind

#: Values tried for launch parameters: all combinations of the first step's, then the next's with the best so far.
Step = dict[str, tuple[int, ...]]
STEPS: tuple[Step, ...] = (
    {"num_warps": (1, 2, 4), "num_stages": (2, 3, 4)},
    {"programs_per_processor": (2, 4, 8, 16, 32)},
)
LATENT_STEPS: tuple[Step, ...] = (
    {"heads": (16, 32, 64), "tokens": (32, 64)},
    {"num_warps": (4, 8), "num_stages": (2, 3, 4)},
    {"programs_per_processor": (1, 2, 4)},
)

#: Timed calls of a trial.
CALLS = 20

#: What they are tried on.
TOKENS, BATCH = 32768, 8
QWEN, _, GPT_OSS, _ = GEOMETRIES
CASES: tuple[tuple[Shape, Kind], ...] = (
    (Shape(QWEN, TOKENS, BATCH), "int4"),
    (Shape(QWEN, TOKENS, BATCH), "none"),
    (Shape(QWEN, TOKENS, BATCH), "int8"),
    (Shape(GPT_OSS, TOKENS, BATCH), "int4"),
)
LATENT_CASES = tuple(case for case in latent_cases(quick=True) if case.kind != "int8")


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """Median milliseconds with some launch parameters, or why there are none."""

    tuning: dict[str, int]
    p50_ms: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class SweepRow:
    """The best launch parameters found for a case, beside the kernel's own choice.

    Attributes
    ----------
    geometry, kind, tokens, batch : str or int
        The case.
    default_ms : float or None
        Median milliseconds with the kernel's own choice.
    best : dict or None
        The launch parameters of the fastest trial with the right result, those not named being the kernel's own
        choice; empty if nothing was faster than that.
    best_ms, gain : float or None
        Its median milliseconds, and how many times as fast as the default it is.
    trials : tuple of Trial
        What was tried beside the default.
    note : str
        Why something is missing.
    """

    geometry: str
    kind: str
    tokens: int
    batch: int
    default_ms: float | None = None
    best: dict[str, int] | None = None
    best_ms: float | None = None
    gain: float | None = None
    trials: tuple[Trial, ...] = ()
    note: str = ""


def sweep_rows(
    bench: Bench,
    red: set[tuple[str, str]],
    time_limit: TimeLimit,
    cases: Sequence[tuple[Shape, Kind]] = CASES,
    steps: Sequence[Step] = STEPS,
) -> Iterator[SweepRow]:
    """Try launch parameters on each case; kinds with a failed check are left out."""
    for shape, kind in cases:
        row = SweepRow(shape.geometry.name, kind, shape.tokens, shape.batch)
        note = why_red(red, OPERATION, kind) or obstacle(bench, shape.packed_bytes(kind), time_limit)
        prepare = functools.partial(random_problem, bench, shape, kind)
        yield _row(bench, dataclasses.replace(row, note=note), prepare, steps, time_limit)


def latent_sweep_rows(
    bench: Bench,
    red: set[tuple[str, str]],
    time_limit: TimeLimit,
    cases: Sequence[LatentCase] = LATENT_CASES,
    steps: Sequence[Step] = LATENT_STEPS,
) -> Iterator[SweepRow]:
    """Try launch parameters of the kernel for latents on each case."""
    for case in cases:
        row = SweepRow(case.expanded.name, case.name, case.tokens, case.batch)
        note = why_red(red, LATENT_OPERATION, case.kind) or obstacle(bench, case.packed_bytes, time_limit)
        prepare = functools.partial(random_latents, bench, case)
        yield _row(bench, dataclasses.replace(row, note=note), prepare, steps, time_limit)


def _row(
    bench: Bench, row: SweepRow, prepare: Callable[[], Problem], steps: Sequence[Step], time_limit: TimeLimit
) -> SweepRow:
    if row.note:
        return row
    try:
        return _swept(bench, row, prepare(), steps, time_limit)
    except RuntimeError as error:  # Launch parameters tried before may have left the device unusable.
        return dataclasses.replace(row, note=reason(error))


def _swept(bench: Bench, row: SweepRow, problem: Problem, steps: Sequence[Step], time_limit: TimeLimit) -> SweepRow:
    default = _trial(bench, problem, {})
    best, trials = default, []
    for step in steps:
        for values in itertools.product(*step.values()):
            tuning = best.tuning | dict(zip(step, values, strict=True))
            trials.append(Trial(tuning, None, NO_TIME) if time_limit.is_spent() else _trial(bench, problem, tuning))
        best = min(best, *trials, key=lambda trial: float("inf") if trial.p50_ms is None else trial.p50_ms)
    row = dataclasses.replace(row, default_ms=default.p50_ms, trials=tuple(trials), note=default.note)
    if best.p50_ms is None or default.p50_ms is None:
        return row
    return dataclasses.replace(row, best=best.tuning, best_ms=best.p50_ms, gain=default.p50_ms / best.p50_ms)


def _trial(bench: Bench, problem: Problem, tuning: dict[str, int]) -> Trial:
    try:
        error, bound = lane_error(problem, *problem.run(bench.backend, tuning or None)[:2])
        if not error <= bound:
            return Trial(tuning, None, f"wrong: error {error:.3g}, bound {bound:.3g}")
        return Trial(tuning, bench.stopwatch(lambda: problem.run(bench.backend, tuning or None), CALLS).p50_ms)
    except Exception as failure:  # Parameters that the compiler or the GPU refuses are a result too.
        return Trial(tuning, None, reason(failure))
