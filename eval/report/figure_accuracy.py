"""Draw accuracy against measured bytes: what a method keeps, and what that costs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pikv_hf.eval.report.groups import Entry, Group, group_runs
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.style import (
    DOTTED,
    GREY,
    SMALL,
    Styles,
    draw_series,
    figure,
    method_styles,
    wrap,
    wrapped_lines,
)
from pikv_hf.eval.report.table import measure_name

_LEGEND_WIDTH = 30


def accuracy_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Draw score against measured KV bytes, one panel per group, and write a PNG.

    Parameters
    ----------
    runs : sequence of Run
        Of one or several data sets, lengths and models.
    path : Path or str
        The PNG to write.
    """
    groups = group_runs(runs)
    return draw_accuracy(groups, Path(path), method_styles(groups))


def draw_accuracy(groups: Sequence[Group], path: Path, styles: Styles) -> Path:
    """Draw one panel per group with the given colours; see `accuracy_figure`."""
    shown = [entry.method for group in groups for entry in group.entries if is_drawn(entry)]
    methods = list(dict.fromkeys(shown))
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    # A legend line is a fifth of an inch.
    legend = 0.2 * (wrapped_lines(methods, _LEGEND_WIDTH) + 3)
    with figure(max(4.4, 3.4 * rows, legend + 0.6), path) as drawing:
        panels = drawing.subplots(rows, columns, squeeze=False).flat
        for group, axes in zip(groups, panels, strict=False):
            _panel(axes, group, styles)
            axes.set_title(wrap(group.title, 80 // columns))
        drawing.supxlabel("KV bytes after prefill (% of DynamicCache in bf16)", fontsize=10)
        for axes in list(panels)[len(groups) :]:
            axes.set_visible(False)
        _legend(drawing, methods, styles)
    return path


def is_drawn(entry: Entry) -> bool:
    """Whether the bytes of a run were measured, so that it has a place in the figure."""
    return entry.summary.cost.kv_share_prefill is not None


def pareto_front(group: Group) -> list[Entry]:
    """Return the runs that no other one beats in bytes and score at once, by bytes."""
    drawn = [entry for entry in group.entries if is_drawn(entry)]
    front = [entry for entry in drawn if not any(_dominates(other, entry, group) for other in drawn)]
    return sorted(front, key=_point)


def _dominates(one: Entry, other: Entry, group: Group) -> bool:
    """Whether `one` is at least as good in both, and better in one."""
    sign = 1 if group.measure.higher_is_better else -1
    (x1, y1), (x2, y2) = _point(one), _point(other)
    return x1 <= x2 and sign * y1 >= sign * y2 and (x1, y1) != (x2, y2)


def _point(entry: Entry) -> tuple[float, float]:
    """Return where a run is drawn: its bytes in percent, and its score."""
    share = entry.summary.cost.kv_share_prefill
    assert share is not None
    return 100 * share, entry.summary.score.mean


def _panel(axes: Any, group: Group, styles: Styles) -> None:
    drawn = [entry for entry in group.entries if is_drawn(entry)]
    axes.axvline(100, color=GREY, linewidth=1, linestyle=DOTTED, zorder=1)
    for method in dict.fromkeys(entry.method for entry in drawn):
        _method(axes, [entry for entry in drawn if entry.method == method], styles)
    _front(axes, pareto_front(group))
    axes.grid(True)
    axes.set_ylabel(measure_name(group.measure))
    # The largest share may be far above 100, when a model runs in fp32.
    axes.set_xlim(0, 1.06 * max([100.0, *(_point(entry)[0] for entry in drawn)]))
    if group.measure.unit == "%":
        axes.set_ylim(*_score_limits(drawn))


def _score_limits(entries: Sequence[Entry]) -> tuple[float, float]:
    """Room for all intervals, of ten points at least, so that noise alone does not look like a cliff."""
    scores = [entry.summary.score for entry in entries]
    low, high = min((each.low for each in scores), default=0.0), max((each.high for each in scores), default=100.0)
    margin = max(0.05 * (high - low), (10 - (high - low)) / 2, 1.0)
    return max(-2.0, low - margin), min(102.0, high + margin)


def _method(axes: Any, entries: Sequence[Entry], styles: Styles) -> None:
    ordered = sorted(entries, key=lambda entry: entry.summary.compression_ratio)
    shares = [_point(entry)[0] for entry in ordered]
    draw_series(axes, shares, [entry.summary.score for entry in ordered], styles[entries[0].method])


def _front(axes: Any, front: Sequence[Entry]) -> None:
    if not front:
        return
    x, y = zip(*map(_point, front), strict=True)
    axes.plot(x, y, color="black", linewidth=5, alpha=0.12, drawstyle="steps-post", zorder=1.5)
    axes.plot(
        x,
        y,
        linestyle="none",
        marker="o",
        markersize=13,
        fillstyle="none",
        color="black",
        mew=0.9,
        zorder=4,
        clip_on=False,
    )


def _legend(drawing: Figure, methods: Sequence[str], styles: Styles) -> None:
    front = Line2D([], [], color="#dddddd", linewidth=5, marker="o", markersize=11, mec="black", mfc="none")
    front.set_label("Pareto front")
    full = Line2D([], [], color=GREY, linestyle=DOTTED, label="100%: DynamicCache, bf16")
    handles = [*(styles[method].handle(method) for method in methods), front, full]
    drawing.legend(handles=handles, loc="outside right upper", fontsize=SMALL, labelspacing=0.6)
