"""Draw accuracy against measured bytes on a log axis: a few methods named at their lines, all others grey."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from pikv_hf.eval.report.budgets import MethodRuns, methods, one_group
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.style import DOTTED, GREY, SMALL, draw_series, figure, series_style
from pikv_hf.eval.report.summary_file import Estimate
from pikv_hf.eval.report.table import measure_name

#: Methods of kvpress that get a colour and a name: so many with the best mean over the budgets that all have.
NAMED = 3
_TICKS = (2.5, 5, 6.25, 12.5, 25, 50, 100)
_LIMITS = (1.7, 125.0)
_PALE = "#b9b9b9"
#: Points of the y axis that one line of a label takes.
_LINE = 5.0


def budget_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Draw score against measured KV bytes of `PiKVPress`, the best of the other libraries' presses, and the rest.

    Parameters
    ----------
    runs : sequence of Run
        Of one data set, length and model, scores in percent.
    path : Path or str
        The PNG to write.

    Raises
    ------
    InputError
        If the runs are of several data sets, lengths or models.
    """
    group = one_group(runs)
    found = [method for method in methods(group) if _scores(method)]
    pressed = [method for method in found if method.press is not None]
    named = [method for method in pressed if method.press == "PiKVPress"] + best_others(pressed)
    with figure(4.6, Path(path)) as drawing:
        axes = drawing.subplots()
        for method in pressed:
            if method not in named:
                axes.plot(*_line(method), color=_PALE, linewidth=1, marker=".", markersize=4, zorder=2)
        for index, method in enumerate(named):
            draw_series(axes, _line(method)[0], _scores(method), series_style(index), linewidth=1.8)
        _full(axes, found)
        _name(axes, named)
        axes.set_ylabel(measure_name(group.measure))
        _scale(axes)
    return Path(path)


def best_others(pressed: Sequence[MethodRuns]) -> list[MethodRuns]:
    """Return the best methods that are not this project's, by their mean score over the budgets that all have."""
    others = [method for method in pressed if not method.own]
    ratios = [{run.summary.compression_ratio for run in method.runs} for method in others]
    # A method that failed at a budget does not take it from the others.
    common = set.intersection(*(each for each in ratios if len(each) == max(map(len, ratios)))) if ratios else set()
    complete = [method for method in others if all(method.at(ratio) is not None for ratio in common)]
    return sorted(complete, key=lambda method: (-_mean(method, common), method.label))[:NAMED]


def _mean(method: MethodRuns, ratios: set[float]) -> float:
    return statistics.fmean(run.summary.score.mean for ratio in ratios if (run := method.at(ratio)) is not None)


def _line(method: MethodRuns) -> tuple[list[float], list[float]]:
    """Return the bytes in percent and the scores of the runs whose bytes were measured."""
    shares = [100 * share for run in method.runs if (share := run.summary.cost.kv_share_prefill) is not None]
    return shares, [score.mean for score in _scores(method)]


def _scores(method: MethodRuns) -> list[Estimate]:
    return [run.summary.score for run in method.runs if run.summary.cost.kv_share_prefill is not None]


def _full(axes: Any, found: Sequence[MethodRuns]) -> None:
    """Draw the score of DynamicCache without a press as a line across, and name it."""
    for method in found:
        if method.runs[0].summary.is_baseline:
            score = method.runs[0].summary.score.mean
            axes.axhline(score, color=GREY, linewidth=1, linestyle=DOTTED, zorder=1)
            axes.annotate(
                f"DynamicCache, {score:.1f}",
                (_LIMITS[1], score),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=SMALL,
                color=GREY,
            )


def _name(axes: Any, named: Sequence[MethodRuns]) -> None:
    """Write the names of methods left of the ends of their lines, moved apart where they would overlap."""
    ends = [(_line(method)[0][-1], _line(method)[1][-1]) for method in named]
    places = spread([y for _, y in ends], _LINE)
    for index, (method, (x, _), place) in enumerate(zip(named, ends, places, strict=True)):
        axes.annotate(
            method.label.removesuffix(" on PiKVCache").replace("Press", ""),
            (x, place),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=SMALL,
            color=series_style(index).colour,
            zorder=5,
        )
    axes.annotate(
        "grey: the other methods of the table", (0.99, 0.03), xycoords="axes fraction", ha="right", fontsize=SMALL,
        color=GREY,
    )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return places at least `gap` apart, in the same order, the groups that touch kept around their middle."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _ends(groups[-2], places, gap)[1] + gap > _ends(groups[-1], places, gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        low = _ends(group, places, gap)[0]
        for rank, index in enumerate(group):
            moved[index] = low + gap * rank
    return moved


def _ends(group: Sequence[int], places: Sequence[float], gap: float) -> tuple[float, float]:
    middle, half = statistics.fmean(places[index] for index in group), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def _scale(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*_LIMITS)
    axes.set_ylim(-2, 106)
    axes.set_yticks(range(0, 101, 20))
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}%" for tick in _TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("KV bytes after prefill, share of DynamicCache in bf16 (log scale)")
    axes.grid(True)
