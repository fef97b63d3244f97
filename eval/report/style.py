"""Give figures drawn by matplotlib one look: colour-blind safe, readable at 900 pixels, the same bytes each time."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.report.summary_file import Estimate

#: Inches; shown at 900 pixels, a point of text is then 1.4 pixels.
WIDTH = 9.0
SMALL = 9.0
GREY = "#5f5f5f"
#: Of lines that mark a reference: the baseline, or the bytes of `DynamicCache`.
DOTTED = (0, (1, 2))

#: Dots per inch: two for each pixel.
DPI = 200
#: Few colours are drawn, the others are blends at the edges of letters: a palette makes a third of the bytes.
PALETTE = 128

# Okabe and Ito (2008), less yellow, which is hard to see on white. Seven markers, so that both repeat after 42 series.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RC = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "errorbar.capsize": 2.5,
    # Labels come from result files: a dollar sign must not start a formula.
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """Colour and marker of one series."""

    colour: str
    marker: str
    size: float = 6.5

    def handle(self, label: str) -> Line2D:
        """A legend's key."""
        return Line2D([], [], color=self.colour, marker=self.marker, markersize=self.size, label=label)


def series_style(index: int) -> SeriesStyle:
    """Return the colour and marker of a series by its place in the order."""
    return SeriesStyle(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])


def draw_series(
    axes: Any, places: Sequence[float], scores: Sequence[Estimate], style: SeriesStyle, linewidth: float = 1.2
) -> None:
    """Draw the runs of a method: a marker at each mean, its interval, and a line that joins them in order."""
    axes.errorbar(
        *(places, [score.mean for score in scores]),
        yerr=error_sides(scores),
        color=style.colour,
        marker=style.marker,
        markersize=style.size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=linewidth,
        elinewidth=0.9,
        zorder=3,
        # A marker at the very top is not cut in half.
        clip_on=False,
    )


def error_sides(scores: Sequence[Estimate]) -> list[list[float]]:
    """Return how far intervals reach below and above their means, as matplotlib takes error bars; never negative."""
    below, above = [each.mean - each.low for each in scores], [each.high - each.mean for each in scores]
    return [[max(0.0, distance) for distance in side] for side in (below, above)]


@contextmanager
def figure(height: float, path: Path) -> Iterator[Figure]:
    """Yield an empty figure of this height in inches, and write it to `path` as PNG with a palette.

    The user's matplotlib settings do not enter, and the file has no date or version in it.
    """
    with matplotlib.style.context(["default", _RC], after_reset=True):
        made = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made
        drawn = io.BytesIO()
        made.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(PALETTE, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    few.save(packed, format="PNG", optimize=True, dpi=(DPI, DPI))
    write_file(path, packed.getvalue())
