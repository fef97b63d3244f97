"""Draw scores by task: grouped bars for a few runs, a heat table for many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, Normalize

from pikv_hf.eval.report.groups import Entry, Group
from pikv_hf.eval.report.style import (
    NO_VALUE_COLOUR,
    SCORE_COLOURS,
    SMALL,
    WIDTH,
    Styles,
    error_sides,
    figure,
    hide_spines,
    ink_on,
    lighten,
    wrap,
    wrapped_lines,
)
from pikv_hf.eval.report.table import NOTHING, measure_name

#: More runs than this, or more bars, and bars cannot be told apart.
MOST_BARS = (5, 40)
MEAN = "mean"
_LABEL_WIDTH = 36


def tasks_figure(group: Group, path: Path, styles: Styles) -> Path:
    """Draw the scores of all runs of a group by task, and write a PNG."""
    runs, tasks = len(group.entries), len(group.tasks)
    if runs <= MOST_BARS[0] and runs * tasks <= MOST_BARS[1]:
        return _bars(group, path, styles)
    return _heat_table(group, path)


def task_score(entry: Entry, task: str) -> float | None:
    """Return a run's score of a task, the mean over tasks for `mean`, or None where the run has no such task."""
    if task == MEAN:
        return entry.summary.score.mean
    score = entry.summary.tasks.get(task)
    return None if score is None else score.estimate.mean


def _bars(group: Group, path: Path, styles: Styles) -> Path:
    width = 0.8 / len(group.entries)
    with figure(4.2, path) as drawing:
        axes = drawing.subplots()
        for index, entry in enumerate(group.entries):
            offset = (index - (len(group.entries) - 1) / 2) * width
            _run_bars(axes, group, entry, offset, width, styles)
        axes.set_xticks(range(len(group.tasks)), [wrap(task, 20) for task in group.tasks])
        _turn(axes, len(group.tasks) > 6)
        axes.set_ylabel(measure_name(group.measure))
        axes.set_ylim(0, 104 if group.measure.unit == "%" else None)
        axes.grid(True, axis="y")
        axes.tick_params(axis="x", length=0)
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower left", ncols=2)
    return path


def _run_bars(axes: Any, group: Group, entry: Entry, offset: float, width: float, styles: Styles) -> None:
    scores = {place: entry.summary.tasks[task] for place, task in enumerate(group.tasks) if task in entry.summary.tasks}
    estimates = [score.estimate for score in scores.values()]
    siblings = [each for each in group.entries if each.method == entry.method]
    axes.bar(
        [place + offset for place in scores],
        [each.mean for each in estimates],
        0.92 * width,
        yerr=error_sides(estimates),
        # Runs of one method share its colour; a lighter bar is a higher ratio.
        color=lighten(styles[entry.method].fill, 0.6 * siblings.index(entry) / len(siblings)),
        label=wrap(entry.label, 55),
        error_kw={"elinewidth": 0.9, "ecolor": "black"},
    )


def _heat_table(group: Group, path: Path) -> Path:
    columns = (*group.tasks, *([MEAN] if len(group.tasks) > 1 else []))
    labels = [wrap(entry.label, _LABEL_WIDTH) for entry in group.entries]
    with figure(1.7 + _row_height(group) * len(group.entries), path, _width(labels, len(columns))) as drawing:
        axes = drawing.subplots()
        scores = [[task_score(entry, task) for task in columns] for entry in group.entries]
        draw_cells(axes, scores, _limits(group, scores), decimals=1 if len(columns) <= 14 else 0)
        axes.set_xticks(range(len(columns)), [wrap(task, 20) for task in columns])
        axes.set_yticks(range(len(group.entries)), labels)
        axes.xaxis.tick_top()
        _turn(axes, len(columns) > 4)
        if MEAN in columns:
            axes.axvline(len(columns) - 1.5, color="white", linewidth=5)
    return path


def draw_cells(
    axes: Any, scores: Sequence[Sequence[float | None]], limits: tuple[float, float], decimals: int = 0
) -> Any:
    """Draw an annotated heat table; None is a grey cell with a dash. Returns the image, for a colour bar."""
    colours: Colormap = matplotlib.colormaps[SCORE_COLOURS].with_extremes(bad=NO_VALUE_COLOUR)
    values = np.array([[np.nan if score is None else score for score in row] for row in scores])
    norm = Normalize(*limits)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        ink = "black" if missing else ink_on(colours, float(norm(value)))
        text = NOTHING if missing else f"{value:.{decimals}f}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=SMALL)
    _cell_edges(axes, *values.shape)
    return image


def _cell_edges(axes: Any, rows: int, columns: int) -> None:
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    hide_spines(axes)


def _limits(group: Group, scores: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    if group.measure.unit == "%":
        return 0.0, 100.0
    known = [score for row in scores for score in row if score is not None]
    return min(known), max(known)


def _width(labels: Sequence[str], columns: int) -> float:
    """Inches that the longest line of a label needs, and each cell with `100` in it."""
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(WIDTH, 0.4 + 0.08 * longest + 0.28 * columns)


def _row_height(group: Group) -> float:
    """Inches that the longest label needs."""
    return max(*(0.17 * wrapped_lines([entry.label], _LABEL_WIDTH) for entry in group.entries), 0.3)


def _turn(axes: Any, crowded: bool) -> None:
    if crowded:
        top = axes.xaxis.get_ticks_position() == "top"
        anchor = {"ha": "left" if top else "right", "rotation_mode": "anchor"}
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(**anchor)
