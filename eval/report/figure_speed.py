"""Draw the speed of prefill and decoding, against the baseline where there is one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.report.groups import Group
from pikv_hf.eval.report.style import DOTTED, GREY, SMALL, Styles, figure, wrap, wrapped_lines
from pikv_hf.eval.report.table import NOTHING, times

_PHASES = {"prefill_tokens_per_s": "prefill", "decode_tokens_per_s": "decoding"}
_LABEL_WIDTH = 32


def speed_figure(group: Group, path: Path, styles: Styles) -> Path:
    """Draw both speeds of all runs of a group, and write a PNG.

    Speeds are ratios to the baseline if any run has one that was measured on its machine, else tokens per second.
    """
    labels = [wrap(entry.label, _LABEL_WIDTH) for entry in group.entries]
    height = 0.95 + 0.17 * (wrapped_lines([entry.label for entry in group.entries], _LABEL_WIDTH) + len(labels) * 0.7)
    with figure(max(1.9, height), path) as drawing:
        panels = drawing.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, _PHASES, strict=True):
            _panel(axes, group, name, styles)
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.4, -0.6)
    return path


def is_relative(group: Group, name: str) -> bool:
    """Whether a speed is shown as a ratio to the baseline."""
    others = [entry for entry in group.entries if not entry.summary.is_baseline]
    return any(group.speed_ratio(entry, name) is not None for entry in others)


def has_speeds(group: Group) -> bool:
    """Whether any run's speed was measured."""
    return any(getattr(entry.summary.cost, name) is not None for entry in group.entries for name in _PHASES)


def _panel(axes: Any, group: Group, name: str, styles: Styles) -> None:
    relative = is_relative(group, name)
    values = [
        group.speed_ratio(entry, name) if relative else getattr(entry.summary.cost, name) for entry in group.entries
    ]
    colours = [styles[entry.method].fill for entry in group.entries]
    axes.barh(range(len(values)), [value or 0 for value in values], 0.7, color=colours)
    _annotate(axes, values, relative)
    if relative:
        axes.axvline(1, color=GREY, linewidth=1, linestyle=DOTTED)
    axes.set_xlabel(f"{_PHASES[name]} speed ({'times the baseline' if relative else 'tokens/s'})")
    axes.set_xlim(0, 1.22 * max([value for value in values if value], default=1.0))
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)


def _annotate(axes: Any, values: Sequence[float | None], relative: bool) -> None:
    for place, value in enumerate(values):
        text = times(value) if relative else NOTHING if value is None else f"{value:,.0f}"
        axes.annotate(
            *(text, (value or 0, place), (4, 0)),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0},
        )
