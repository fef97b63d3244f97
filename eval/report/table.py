"""Make the table of runs: one row per run, the same cells in Markdown and HTML."""

import html
import re
from collections.abc import Sequence

from pikv_hf.eval.report.groups import Entry, Group, group_runs
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.summary_file import Estimate, Measure

#: What a cell shows that was not measured or has nothing to be compared with.
NOTHING = "–"
#: How the shares in all tables and figures were measured.
BYTES_NOTE = (
    "KV bytes are counted on the live storages of the cache, after the context was read and after the answer, and "
    "given as a share of what DynamicCache would hold in bf16."
)


class Bold(str):
    """A cell that Markdown shows in bold."""

    __slots__ = ()


def markdown_table(runs: Sequence[Run]) -> str:
    """Return the runs as Markdown, one table per group, each under its title if there are several.

    Columns: label, score with its 95% interval, KV bytes after prefill and at the end in percent of `DynamicCache` in
    bf16, and decoding speed relative to the baseline (`DynamicCache` without a press, same data set, length, model and
    machine). The baseline comes first, then runs by press and ratio.
    """
    groups = group_runs(runs)
    tables = [markdown(header_cells(group.measure), [row_cells(group, entry) for entry in group.entries])
              for group in groups]  # fmt: skip
    if len(groups) == 1:
        return tables[0]
    return "\n".join(f"**{escape(group.title)}**\n\n{table}" for group, table in zip(groups, tables, strict=True))


def header_cells(measure: Measure) -> list[str]:
    """Return the names of the columns."""
    return ["run", f"{measure_name(measure)}, 95% interval", "KV after prefill", "KV at end", "decode speed"]


def row_cells(group: Group, entry: Entry) -> list[str]:
    """Return one run's cells, in the order of `header_cells`."""
    cost = entry.summary.cost
    return [
        entry.label,
        interval(entry.summary.score, group.measure),
        percent(cost.kv_share_prefill),
        percent(cost.kv_share_end),
        times(group.speed_ratio(entry, "decode_tokens_per_s")),
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left and all others right aligned, padded to be read as it is."""
    cells = [[f"**{escape(cell)}**" if isinstance(cell, Bold) else escape(cell) for cell in row]
             for row in (header, *rows)]  # fmt: skip
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, within a table too."""
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(text, quote=False))


def measure_name(measure: Measure) -> str:
    """Return `score (%)`, or `perplexity (lower is better)`."""
    notes = [measure.unit] * bool(measure.unit) + ["lower is better"] * (not measure.higher_is_better)
    return f"{measure.name} ({', '.join(notes)})" if notes else measure.name


def interval(estimate: Estimate, measure: Measure) -> str:
    """Return `96.2 (95.1–97.0)`."""
    mean, low, high = (number(value, measure.unit) for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} ({low}–{high})"


def number(value: float, unit: str) -> str:
    """Return percent with one decimal, anything else, such as a perplexity, with three."""
    return f"{value:.1f}" if unit == "%" else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Return a share of 1 as percent."""
    return NOTHING if share is None else f"{share:.1%}"


def times(ratio: float | None) -> str:
    """Return a ratio as `1.25x`."""
    return NOTHING if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(padded)} |"
