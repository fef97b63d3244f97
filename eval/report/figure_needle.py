"""Draw needles in haystacks: the score by depth of the needle and length of the context, one panel per run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.report.figure_tasks import draw_cells
from pikv_hf.eval.report.groups import Entry, Group
from pikv_hf.eval.report.runs import DEPTH
from pikv_hf.eval.report.style import WIDTH, figure, wrap

#: Inches of a cell with `100` in it.
_CELL = (0.36, 0.24)


def needle_figure(group: Group, path: Path) -> Path:
    """Draw the needle runs of a group on one scale, 0 to 100, and write a PNG."""
    entries = needle_entries(group)
    depths, lengths = _values(entries, DEPTH), _values(entries, "length")
    columns = _columns(len(entries), len(lengths))
    rows = math.ceil(len(entries) / columns)
    width = max(WIDTH, 1.6 + _CELL[0] * len(lengths))
    with figure(rows * (1.1 + _CELL[1] * len(depths)) + 0.5, path, width) as drawing:
        panels = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for entry, axes in zip(entries, panels.flat, strict=False):
            image = draw_cells(axes, _means(entry, depths, lengths), (0.0, 100.0))
            axes.set_title(wrap(entry.label, 90 // columns))
            _ticks(axes, depths, lengths)
        _outer_labels(panels, len(entries))
        drawing.colorbar(image, ax=panels, label="score (%)", fraction=0.03, pad=0.015)
    return path


def needle_entries(group: Group) -> list[Entry]:
    """Return the runs whose samples have depths."""
    return [entry for entry in group.entries if entry.run.has_depths]


def _values(entries: Sequence[Entry], column: str) -> list[float]:
    return sorted({float(value) for entry in entries for value in entry.run.rows[column]})


def _columns(panels: int, lengths: int) -> int:
    """As many panels side by side as leave each cell its width, at most four."""
    fitting = int((WIDTH - 1.4) / (0.3 + _CELL[0] * lengths))
    return max(1, min(panels, fitting, 4))


def _means(entry: Entry, depths: Sequence[float], lengths: Sequence[float]) -> list[list[float | None]]:
    means = entry.run.rows.groupby([DEPTH, "length"])["score"].mean().to_dict()
    return [[_percent(means.get((depth, length))) for length in lengths] for depth in depths]


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def _ticks(axes: Any, depths: Sequence[float], lengths: Sequence[float]) -> None:
    axes.set_xticks(range(len(lengths)), [f"{length:,.0f}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.3g}%" for depth in depths])
    if len(lengths) > 3:
        axes.tick_params(axis="x", labelrotation=40)


def _outer_labels(panels: Any, used: int) -> None:
    """Name the axes at the edge; a column that ends early gets its labels where it ends."""
    columns = panels.shape[1]
    for index, axes in enumerate(panels.flat):
        axes.set_visible(index < used)
        if index % columns == 0:
            axes.set_ylabel("depth of the needle")
        if index + columns >= used:
            axes.set_xlabel("context (tokens)")
            axes.tick_params(axis="x", labelbottom=True)
