"""Run the GPU check: its parts in order of importance, each printed and written as it ends."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pikv_hf.eval.gpu.arena import Arena
from pikv_hf.eval.gpu.attention_speed import AttentionSpeed, attention_speeds
from pikv_hf.eval.gpu.check_attention import attention_plans
from pikv_hf.eval.gpu.check_lists import list_plans
from pikv_hf.eval.gpu.check_pages import page_plans
from pikv_hf.eval.gpu.checks import Check, PlannedCheck, Platform, reason, red_operations, run_checks
from pikv_hf.eval.gpu.console import (
    ATTENTION_HEADER,
    LATENT_HEADER,
    LIST_HEADER,
    PAGE_HEADER,
    attention_line,
    check_lines,
    latent_line,
    list_line,
    page_line,
    sweep_line,
    target_line,
)
from pikv_hf.eval.gpu.copy_speed import Bench, as_row, copy_speed
from pikv_hf.eval.gpu.geometry import Shape, attention_cases
from pikv_hf.eval.gpu.latent_speed import LatentCase, latent_cases, latent_speeds
from pikv_hf.eval.gpu.list_speed import list_cases, list_speeds
from pikv_hf.eval.gpu.page_speed import Sizes, page_speeds
from pikv_hf.eval.gpu.run_report import Report, checks_part, gpu_facts, not_run
from pikv_hf.eval.gpu.sweep import latent_sweep_rows, sweep_rows
from pikv_hf.eval.gpu.targets import TARGET_BATCH, TARGET_TOKENS, TARGETS, judged
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import CudaStopwatch, Stopwatch
from pikv_hf.kernels.page_codes import Kind

#: The share of the free GPU memory that keys and values may take.
MEMORY_SHARE = 0.88


@dataclasses.dataclass(frozen=True, slots=True)
class Agenda:
    """What a run does.

    Attributes
    ----------
    plans : sequence of PlannedCheck
        The checks.
    cases : sequence
        Shapes and kinds that attention is measured with, by importance.
    sizes : Sizes
        Of the other operations' measurements.
    sweep : bool
        Whether launch parameters are tried.
    latents : sequence of LatentCase
        What latent attention is measured with, by importance.
    lists : sequence
        Shapes, and the kinds of the pools, that a whole step is measured with, by importance.
    """

    plans: Sequence[PlannedCheck]
    cases: Sequence[tuple[Shape, Kind]]
    sizes: Sizes
    sweep: bool
    latents: Sequence[LatentCase] = ()
    lists: Sequence[tuple[Shape, tuple[Kind, ...]]] = ()


def full_agenda(*, quick: bool, sweep: bool) -> Agenda:
    """Return what to do on a GPU."""
    plans = [*attention_plans(quick=quick), *list_plans(quick=quick), *page_plans(quick=quick)]
    latents, lists = list(latent_cases(quick=quick)), list(list_cases(quick=quick))
    return Agenda(plans, list(attention_cases(quick=quick)), Sizes(), sweep, latents, lists)


class Session:
    """Runs an agenda, prints what comes out and adds it to a report.

    Parameters
    ----------
    report : Report
        Where results go.
    platform : Platform
        Device and backend.
    time_limit : TimeLimit
        No check or measurement begins once it is spent.
    """

    def __init__(self, report: Report, platform: Platform, time_limit: TimeLimit) -> None:
        self._report, self._platform, self._time_limit = report, platform, time_limit
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._speeds: list[AttentionSpeed] = []

    def run(self, agenda: Agenda, arena_bytes: Callable[[], int], stopwatch: Callable[[], Stopwatch]) -> bool:
        """Do everything; return whether anything is wrong or any check was left out."""
        results = self.check(agenda.plans)
        checks = [result for result in results if isinstance(result, Check)]
        wrong = len(checks) < len(results) or not all(check.ok for check in checks)
        try:
            timer = stopwatch()
            bench = self.bench(arena_bytes(), timer)
        except RuntimeError as error:  # A kernel that read where it must not leaves the device unusable.
            self._add(measurements=reason(error))
            print(f"nothing can be measured: {reason(error)}")
            return True
        failed = self.measure(bench, agenda, red_operations(checks))
        self._finish()
        return wrong or failed

    def check(self, plans: Sequence[PlannedCheck]) -> list[Check | PlannedCheck]:
        """Run the checks."""
        results: list[Check | PlannedCheck] = []

        def kept() -> Iterator[Check | PlannedCheck]:
            for result in run_checks(plans, self._platform, self._time_limit):
                results.append(result)
                yield result

        for line in check_lines(kept()):
            print(line, flush=True)
        self._add(correctness=checks_part(results))
        return results

    def bench(self, arena_bytes: int, stopwatch: Stopwatch) -> Bench:
        """Take the memory and measure the copy."""
        arena = Arena(arena_bytes, self._platform.device)
        copied = copy_speed(arena, stopwatch)
        print(
            f"\ncopy of {copied.bytes_copied / 1e9:.1f} GB: {copied.gb_per_s:.0f} GB/s read plus written\n", flush=True
        )
        self._add(copy_bandwidth=as_row(copied))
        return Bench(self._platform.device, self._platform.backend, arena, stopwatch, copied.gb_per_s)

    def measure(self, bench: Bench, agenda: Agenda, red: set[tuple[str, str]]) -> bool:
        """Measure, what has targets first; return whether a kernel failed."""
        important = [case for case in agenda.cases if case[0].tokens >= TARGET_TOKENS and case[0].batch >= TARGET_BATCH]
        rest = [case for case in agenda.cases if case not in important]
        print(ATTENTION_HEADER)
        failed = self._attention(bench, important, red)
        print(f"\n{LATENT_HEADER}")
        for latent in latent_speeds(bench, agenda.latents, red, self._time_limit):
            failed |= latent.failed
            self._row("latent_attention", latent, latent_line(latent))
        print(f"\n{LIST_HEADER}")
        for step in list_speeds(bench, agenda.lists, red, self._time_limit):
            failed |= step.failed
            self._row("steps", step, list_line(step))
        print(f"\n{PAGE_HEADER}")
        for speed in page_speeds(bench, red, self._time_limit, agenda.sizes):
            failed |= speed.failed
            self._row("other_kernels", speed, page_line(speed))
        if agenda.sweep:
            for rows in (sweep_rows, latent_sweep_rows):
                for row in rows(bench, red, self._time_limit):
                    self._row("sweep", row, sweep_line(row))
        print(f"\n{ATTENTION_HEADER}")
        return self._attention(bench, rest, red) or failed

    def _attention(self, bench: Bench, cases: Sequence[tuple[Shape, Kind]], red: set[tuple[str, str]]) -> bool:
        failed = False
        for speed in attention_speeds(bench, cases, red, self._time_limit):
            failed |= speed.failed
            self._speeds.append(speed)
            self._row("attention", speed, attention_line(speed))
        return failed

    def _row(self, part: str, result: Any, line: str) -> None:
        print(line, flush=True)
        self._rows.setdefault(part, []).append(as_row(result))
        self._add(**self._rows)

    def _finish(self) -> None:
        targets = [judged(target, self._speeds) for target in TARGETS]
        print("", *map(target_line, targets), sep="\n")
        left_out = [name for rows in self._rows.values() for name in not_run(rows)]
        self._add(targets=targets, not_run=left_out, complete=True)
        print(f"\n{len(left_out)} measurements not run for want of time" if left_out else "")
        print(f"{self._time_limit.spent():.0f} s; {self._report.path}")

    def _add(self, **parts: Any) -> None:
        self._report.add(self._time_limit.spent(), **parts)


def run(folder: Path, time_limit: TimeLimit, *, quick: bool, sweep: bool) -> bool:
    """Check and measure on the current CUDA device; return whether anything is wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(folder, gpu_facts(device))

    def arena_bytes() -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)

    session = Session(report, Platform(device, "triton"), time_limit)
    with torch.no_grad():
        return session.run(full_agenda(quick=quick, sweep=sweep), arena_bytes, functools.partial(CudaStopwatch, device))
