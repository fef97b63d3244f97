"""Show steps of several caches: a line for each as it comes, then a table with a heading for each case."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from pikv_hf.reports.fitting_table import FittingTable, light_table
from pikv_hf.reports.memory_report import format_bytes

from .bench_table import show
from .steps import StepTiming


def run_and_show_steps(timings: Iterable[StepTiming], threads: int, output: Path | None) -> None:
    """Run, print and write down steps, as :func:`~pikv_hf.eval.bench.bench_table.show` does."""
    show(timings, threads, output, _line, step_table)


def _line(each: StepTiming) -> str:
    spent = each.timing
    low, middle, high = map(_milliseconds, (spent.p20, spent.p50, spent.p80))
    return (
        f"{_case(each)}, {each.cache}: {middle} ms ({low}-{high}, {spent.count} times), {format_bytes(each.kv_bytes)}"
    )


def step_table(done: list[StepTiming]) -> FittingTable:
    """Return the table of these timings, which fits 80 columns."""
    table = light_table(
        "Median ms of a step, and over those of others; MiB of a temporary",
        *("cache", "ms", "to exact", "dynamic", "kept", "bytes", "largest", "differs"),
    )
    for case, timings in groupby(done, _case):
        table.add_row(f"[bold]{case}", *[""] * 7)
        for each in timings:
            table.add_row(
                each.cache,
                _milliseconds(each.timing.p50),
                *(_ratio(ratio) for ratio in (each.to_exact, each.to_dynamic, each.to_kept, each.bytes_to_dynamic)),
                "" if each.temporary is None else f"{each.temporary.nbytes / 2**20:.1f}",
                "" if each.max_difference is None else f"{each.max_difference:.0e}",
            )
    return table


def _case(each: StepTiming) -> str:
    return f"{each.case} {each.tokens:,}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
