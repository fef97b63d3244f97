"""Write the report: one HTML page that needs nothing else, its figures as SVG files, and its tables as Markdown."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.report.figure_accuracy import SHAPES, draw_accuracy, write_figure
from pikv_hf.eval.report.groups import group_runs
from pikv_hf.eval.report.overview import Block, blocks
from pikv_hf.eval.report.page_runs import HEADS, run_rows
from pikv_hf.eval.report.page_tables import (
    OVER,
    SPEEDS,
    Grid,
    Needles,
    budget_grid,
    budget_name,
    is_relative,
    memory_grids,
    needle_tables,
    speed_grids,
    task_grids,
)
from pikv_hf.eval.report.pareto import is_drawn
from pikv_hf.eval.report.ratios import ratio_table
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.table import BYTES_NOTE, markdown_table, measure_name

PAGE = "report.html"
TABLE = "table.md"
RATIOS = "ratios.md"
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Section:
    """What the page shows of one block."""

    block: Block
    asked: str
    measure: str
    corner: str
    figures: tuple[str, ...]
    caption: str
    budgets: Grid
    legend: str
    tasks: list[tuple[str, Grid]]
    opened: str
    needles: list[Needles]
    speeds: list[tuple[str, Grid]]
    speed_note: str
    memory: list[tuple[str, Grid]]


def write_report(runs: Sequence[Run], output: Path | str, title: str = "PiKV evaluation") -> Path:
    """Write `report.html`, its figures as SVG files, `table.md` (a row per run) and `ratios.md` (a row per method).

    The same runs give the same bytes. The page loads nothing, runs no script but its own, reads as well without it, and
    escapes all that models wrote. 80 runs make less than 1 MB.

    Parameters
    ----------
    runs : sequence of Run
        From `load_runs`.
    output : Path or str
        A folder; made where it is missing.
    title : str
        Of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If there are no runs or `output` is a file.
    """
    output = Path(output)
    if not runs:
        raise InputError("a report needs at least one run, got none")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, expected a folder for the report")
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / TABLE, markdown_table(runs))
    write_file(output / RATIOS, ratio_table(runs))
    shown = blocks(group_runs(runs))
    for block in shown:
        for index in _drawn(block):
            write_figure(block, index, output / f"{block.groups[index].slug}-accuracy.svg")
    page = output / PAGE
    write_file(page, _render(shown, title))
    return page


def _render(shown: Sequence[Block], title: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = _parts
    rows, origins = run_rows(shown)
    script = (_FOLDER / "script.js.jinja").read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        title=title,
        sections=[_section(block) for block in shown],
        several_models=any(len(block.models) > 1 for block in shown),
        shapes=SHAPES,
        heads=HEADS,
        runs=rows,
        origins=origins,
        not_shown=_not_shown(shown),
        bytes_note=BYTES_NOTE,
        script=script,
        script_hash=_hash(script),
    )


def _section(block: Block) -> Section:
    tasks = task_grids(block)
    return Section(
        block=block,
        asked=_asked(block),
        measure=measure_name(block.measure),
        corner=measure_name(block.measure) if block.has_budgets else "cache",
        figures=tuple(draw_accuracy(block, index) for index in _drawn(block)),
        caption=_caption(block),
        budgets=budget_grid(block),
        legend=_legend(block),
        tasks=tasks,
        opened=_opened(block) if tasks else "",
        needles=needle_tables(block),
        speeds=speed_grids(block),
        speed_note=_speed_note(block),
        memory=memory_grids(block),
    )


def _drawn(block: Block) -> list[int]:
    """Return the models with at least two runs to draw: one point alone shows nothing that its row does not say."""
    return [index for index, group in enumerate(block.groups) if sum(map(is_drawn, group.entries)) > 1]


def _asked(block: Block) -> str:
    """Say what was asked; differing numbers of samples too, since intervals depend on them."""
    entries = [entry for group in block.groups for entry in group.entries]
    counts = sorted({entry.summary.samples for entry in entries})
    samples = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    tasks = max(len(group.tasks) for group in block.groups)
    return f"{_plural(len(entries), 'run')}, {_plural(tasks, 'task')}, {samples} samples each."


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _caption(block: Block) -> str:
    unplaced = [row.label for row in block.rows if not any(map(is_drawn, row.runs.values()))]
    missing = f" Not shown, since their bytes were not measured: {', '.join(unplaced)}." if unplaced else ""
    return (
        "Scores against the bytes that the cache really holds. A line joins the budgets of one method; rings and the "
        f"shaded steps are the Pareto front: no other run is better in both.{missing}"
    )


def _legend(block: Block) -> str:
    """Say how the table of budgets is read, as far as there is anything to say."""
    if not block.has_budgets:
        return "KV bytes: held after the context was read, as a share of DynamicCache in bf16."
    return (
        "Small: below a budget the bytes held, as a share of DynamicCache in bf16; below a score its 95% interval. "
        f"Green: best of those that hold at most a tenth more than was asked for. {OVER}: holds more than that, see "
        "Memory. Presses are in the order of how far they are above the others at the same budgets."
    )


def _opened(block: Block) -> str:
    """Return the budget that most methods have, the middle one of several."""
    count = {ratio: sum(place in row.runs for row in block.rows for place in block.places if place[1] == ratio)
             for _, ratio in block.places}  # fmt: skip
    most = sorted(ratio for ratio in count if count[ratio] == max(count.values()))
    return budget_name(most[len(most) // 2])


def _speed_note(block: Block) -> str:
    if not any(is_relative(group, name) for group in block.groups for name in SPEEDS):
        return "Tokens per second; there is no baseline on the same machine to compare with."
    return (
        "Relative to DynamicCache without a press, higher is faster. A dash: no run at this budget, or the baseline "
        "was measured on another machine, or with another dtype, batch size or number of processes."
    )


def _not_shown(shown: Sequence[Block]) -> str:
    """Say how many runs have no answers to show, empty where all have."""
    entries = [entry for block in shown for group in block.groups for entry in group.entries]
    without = sum(entry.run.samples is None for entry in entries)
    return f"The samples of {without} of {len(entries)} runs were not kept: no answers of these." * bool(without)


def _parts(name: str) -> list[str]:
    """Split a name where it may break into lines: between its words and before parentheses."""
    return re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=\w)(?=\()|(?<=,)", name)


def _hash(script: str) -> str:
    """Return how a content security policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"
