"""Show benchmarks as a table while they come, and write their results as JSON."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes

from ..output_files import check_output_file, write_file
from ..provenance import provenance
from ..runner.refusals import refusals
from .decode import Comparison

if TYPE_CHECKING:
    from .press_prefill import PressTiming

WIDTH = 100


def run_and_show(comparisons: Iterable[Comparison], threads: int, output: Path | None) -> None:
    """Run benchmarks, print them and write them down.

    Parameters
    ----------
    comparisons : iterable of Comparison
        A benchmark; its cases run as they are asked for.
    threads : int
        CPU threads.
    output : Path, optional
        A JSON file to write, with machine, versions and command.
    """
    show(comparisons, threads, output, _line, _table)


def run_and_show_presses(timings: "Iterable[PressTiming]", threads: int, output: Path | None) -> None:
    """The same for presses."""
    show(timings, threads, output, _press_line, _press_table)


def show(
    cases: Iterable[Any],
    threads: int,
    output: Path | None,
    line: Callable[[Any], str],
    table: Callable[[list[Any]], Table],
) -> None:
    """Run a benchmark: a line for each case as it comes, a table of all of them, and a file.

    Parameters
    ----------
    cases : iterable of dataclass
        What is measured as it is asked for.
    threads : int
        CPU threads.
    output : Path, optional
        A JSON file to write, with machine, versions and command.
    line, table : callable
        Show one case, and all of them.

    Raises
    ------
    InputError
        If the file cannot be written, or a cache or press refuses what it was asked.
    """
    check_output_file(output, "--output")
    torch.set_num_threads(threads)
    console = Console(log_path=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    done = []
    with console.status("measuring"), refusals("cannot measure"):
        for case in cases:
            done.append(case)
            console.log(line(case))
    console.print(table(done))
    if output is not None:
        result = {**provenance(), "results": [dataclasses.asdict(each) for each in done]}
        write_file(output, json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}", soft_wrap=True)


def _line(each: Comparison) -> str:
    codec = "" if each.codec == "none" else f", {each.codec}"
    codec += "" if each.routing == "all" else f", {each.routing}"
    return f"{each.name}{codec}, batch {each.batch}, {each.tokens:,} tokens: {_times(each.ratio)}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x"


def _table(done: list[Comparison]) -> Table:
    routing = sorted({each.routing for each in done} - {"all"})
    by_case = len({each.name for each in done}) > 1
    table = FittingTable(
        title="Median milliseconds; ratio: times faster than DynamicCache, by medians, by means"
        + (f"\nPiKVCache reads what {', '.join(routing)} chooses" if routing and not by_case else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    with_codecs = any(each.codec != "none" or each.routing != "all" for each in done)
    names = ["case", "batch", "tokens", "PiKVCache", "DynamicCache", "ratio", "of means", "difference"]
    if with_codecs:
        names[:1], names[3:5], names[-1:] = (
            ["case" if by_case else "codec"],
            ["PiKV", "Dynamic"],
            ["bytes", "to none", "differs"],
        )
    for name in names:
        table.add_column(name, justify="left" if name in ("case", "codec") else "right", no_wrap=True)
    for each in done:
        size, slower = each.kv_bytes or 0, each.to_none
        table.add_row(
            each.codec if with_codecs and not by_case else each.name,
            str(each.batch),
            f"{each.tokens:,}",
            f"{each.pikv.p50 * 1e3:,.2f}",
            f"{each.dynamic.p50 * 1e3:,.1f}",
            _times(each.ratio),
            _times(each.mean_ratio),
            *([format_bytes(size), "-" if slower is None else f"{slower:.2f}"] if with_codecs else []),
            f"{each.max_difference:.0e}",
        )
    return table


def _press_line(each: "PressTiming") -> str:
    return f"{each.press}, {each.tokens:,} tokens: {each.to_none:.2f} of the time without a press"


def _press_table(done: "list[PressTiming]") -> Table:
    table = FittingTable(
        title="Prefill on PiKVCache: median milliseconds, and times that of PiKVCache or DynamicCache without a press",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("press", "removed", "tokens", "ms", "to none", "to DynamicCache", "bytes"):
        table.add_column(name, justify="left" if name == "press" else "right", no_wrap=True)
    for each in done:
        table.add_row(
            each.press,
            f"{100 * each.ratio:.4g}%",
            f"{each.tokens:,}",
            f"{each.pikv.p50 * 1e3:,.1f}",
            f"{each.to_none:.2f}",
            f"{each.to_dynamic:.2f}",
            format_bytes(each.kv_bytes),
        )
    return table
