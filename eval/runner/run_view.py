"""Show a finished run as a few lines in the terminal."""

import traceback
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.api import FailedRun
from pikv_hf.eval.runner.processes import processes
from pikv_hf.eval.runner.run import EvalResult
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes


def show(result: EvalResult) -> None:
    """Print scores, bytes and speed of a run; only one process of several prints."""
    if not processes().is_main_process:
        return
    console = Console()
    summary = result.summary
    console.print()
    console.print(f"[bold]{escape(summary['label'])}[/] on {escape(_what(summary))}")
    console.print(_scores(summary))
    for line in _costs(summary):
        console.print(line)
    if result.folder is not None:
        state = "complete already, read from" if result.skipped else "in"
        console.print(f"[dim]{state} {escape(str(result.folder))}[/]", soft_wrap=True)


def show_failures(failures: Sequence[FailedRun], of: int | None = None) -> None:
    """Print which runs failed and why; only one process prints.

    Under their number if it is said of how many, else with the traceback of what is a mistake of this project.
    """
    if not processes().is_main_process:
        return
    console = Console(stderr=True)
    for failure in failures if of is None else ():
        if not isinstance(failure.error, InputError):
            traceback.print_exception(failure.error)
    if of is not None:
        console.print(f"\n[bold]{len(failures)} of {of} runs failed[/]")
    for failure in failures:
        console.print(f"[red]failed[/] {escape(failure.label)}: {escape(failure.reason)}", soft_wrap=True)


def _what(summary: dict[str, Any]) -> str:
    length = f" {summary['data_dir']}" if summary["data_dir"] else ""
    samples = f"{summary['samples']:,} sample{'s' if summary['samples'] != 1 else ''}"
    return f"{summary['dataset']}{length}, {summary['model']} ({summary['dtype']}), {samples}"


def _scores(summary: dict[str, Any]) -> Table:
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for name in ("samples", summary["measure"]["name"], "95% interval"):
        table.add_column(name, justify="right")
    digits = 1 if summary["measure"]["unit"] == "%" else 3
    for task, row in summary["tasks"].items():
        table.add_row(escape(task), row["metric"], *_figures(row["samples"], row, digits))
    table.add_section()
    if len(summary["tasks"]) > 1:
        table.add_row("mean over tasks", "", *_figures(summary["samples"], summary["score"], digits), style="bold")
    return table


def _figures(samples: int, row: dict[str, Any], digits: int) -> tuple[str, str, str]:
    return f"{samples:,}", f"{row['mean']:.{digits}f}", f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"


def _costs(summary: dict[str, Any]) -> list[str]:
    cost = summary["cost"]
    lines = [
        f"KV after prefill {_kv(cost, 'prefill', summary['dtype'])}",
        f"KV at the end    {_kv(cost, 'end', summary['dtype'])}",
        f"prefill {cost['prefill_tokens_per_s']:,.0f} tokens/s, decode {_speed(cost['decode_tokens_per_s'])}",
        f"peak memory of the process {format_bytes(cost['peak_memory_bytes'])}",
    ]
    if cost["cuda_peak_bytes"] is not None:
        lines.append(f"peak memory of the GPU {format_bytes(cost['cuda_peak_bytes'])}")
    return lines


def _kv(cost: dict[str, Any], stage: str, dtype: str) -> str:
    return (
        f"{format_bytes(cost[f'kv_bytes_{stage}'])}, {cost[f'kv_share_{stage}']:.0%} of DynamicCache in bf16 "
        f"({cost[f'kv_share_{stage}_dtype']:.0%} in {dtype})"
    )


def _speed(tokens: float | None) -> str:
    return "not measured" if tokens is None else f"{tokens:,.0f} tokens/s"
