"""Give all figures one look: colour-blind safe, readable at 900 pixels, small files, and the same bytes each time."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.report.groups import Group
from pikv_hf.eval.report.summary_file import Estimate

#: Inches; shown at 900 pixels, a point of text is then 1.4 pixels.
WIDTH = 9.0
SMALL = 9.0
#: Sequential and readable in grey; scores are always shown on 0 to 100.
SCORE_COLOURS = "cividis"
NO_VALUE_COLOUR = "#e4e4e4"
GREY = "#5f5f5f"
#: Of lines that mark a reference: the baseline, or the bytes of `DynamicCache`.
DOTTED = (0, (1, 2))

#: Dots per inch of a figure that a page shows whole, two for each of its pixels, and of one that is taller: a table of
#: 80 runs is scrolled through, and four times the pixels would make it half a megabyte.
DPI, TALL_DPI = 200, 100
#: Inches.
TALL = 8.0
#: Few colours are drawn, the others are blends at the edges of letters: a palette makes a third of the bytes.
PALETTE = 128

# Okabe and Ito (2008), less yellow, which is hard to see on white. Seven markers, so that both repeat after 42 methods.
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
    "svg.hashsalt": "pikv",
}


@dataclass(frozen=True, slots=True)
class MethodStyle:
    """Colour and marker of one method, the same in all figures of a report; `fill` is the colour of its bars."""

    colour: str
    marker: str
    fill: str
    size: float = 6.5

    def handle(self, label: str) -> Line2D:
        """A legend's key."""
        return Line2D([], [], color=self.colour, marker=self.marker, markersize=self.size, label=wrap(label, 30))


Styles = Mapping[str, MethodStyle]


def method_styles(groups: Sequence[Group]) -> Styles:
    """Give each method of all groups its colour and marker; the baseline is a black star."""
    entries = [entry for group in groups for entry in group.entries]
    baselines = {entry.method for entry in entries if entry.summary.is_baseline}
    others = dict.fromkeys(entry.method for entry in entries if entry.method not in baselines)
    styles = {method: series_style(index) for index, method in enumerate(others)}
    # On bars error bars are black, so the baseline's are grey.
    return {**styles, **dict.fromkeys(baselines, MethodStyle("#000000", "*", "#8c8c8c", 11.0))}


def series_style(index: int) -> MethodStyle:
    """Return the colour and marker of the methods' order, for a figure of a few."""
    return _style(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])


def draw_series(
    axes: Any, places: Sequence[float], scores: Sequence[Estimate], style: MethodStyle, linewidth: float = 1.2
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


def _style(colour: str, marker: str) -> MethodStyle:
    return MethodStyle(colour, marker, fill=colour)


@contextmanager
def figure(height: float, path: Path, width: float = WIDTH) -> Iterator[Figure]:
    """Yield an empty figure of this size in inches, and write it to `path` as PNG with a palette.

    The user's matplotlib settings do not enter, and the file has no date or version in it.
    """
    dpi = TALL_DPI if height > TALL else DPI
    with matplotlib.style.context(["default", _RC], after_reset=True):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made
        drawn = io.BytesIO()
        made.savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(PALETTE, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    few.save(packed, format="PNG", optimize=True, dpi=(dpi, dpi))
    write_file(path, packed.getvalue())


def wrap(text: str, width: int) -> str:
    """Break a label into lines of at most `width` characters, and cut the middle out of one that needs over three."""
    lines = textwrap.wrap(text, width)
    if len(lines) > 3:
        # What tells labels apart is mostly at their ends.
        lines = textwrap.wrap(f"{text[: int(1.3 * width)].rstrip()} … {text[-int(1.2 * width) :].lstrip()}", width)[:3]
    return "\n".join(lines) or text


def wrapped_lines(labels: Sequence[str], width: int) -> int:
    """Count the lines of wrapped labels."""
    return sum(wrap(label, width).count("\n") + 1 for label in labels)


def lighten(colour: str, share: float) -> tuple[float, float, float]:
    """Mix this share of white into a colour; unlike transparency it hides the grid behind."""
    red, green, blue = (1 - (1 - channel) * (1 - share) for channel in to_rgb(colour))
    return red, green, blue


def ink_on(colours: Colormap, share: float) -> str:
    """Black or white, whichever is read better on this colour of a map."""
    red, green, blue, _ = colours(share)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def hide_spines(axes: Any) -> None:
    """Leave the cells of a heat table alone."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
