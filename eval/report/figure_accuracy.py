"""Draw accuracy against measured bytes as SVG: what a method keeps, and what that costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise, takewhile
from pathlib import Path

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.report.groups import Entry, Group, group_runs
from pikv_hf.eval.report.overview import BASELINE, Block, Row, blocks
from pikv_hf.eval.report.pareto import is_drawn, pareto_front, point
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.summary_file import Measure
from pikv_hf.eval.report.svg_axes import Axis, halvings, percent_limits, short, wide_limits
from pikv_hf.eval.report.svg_labels import Label, place_labels
from pikv_hf.eval.report.table import interval, measure_name

#: Units of the figure; shown at 350 to 600 pixels.
WIDTH, HEIGHT = 480, 390
#: Beside other figures it is lower, so that the table below begins on the first screen.
LOW = 340
_LEFT, _TOP, _RIGHT, _BELOW = 40.0, 26.0, 466.0, 46.0
#: Pixels of a file's width.
SHOWN = 720
#: Up to so many methods are all named.
FEW = 10
#: Letters of a label in the figure; the table beside it has the whole name.
_LONGEST = 18
_X_NAME = "KV bytes after prefill, % of DynamicCache in bf16 (log)"

#: Shapes by class, around 0: with the colours they tell methods apart twice.
SHAPES: Mapping[str, str] = {
    BASELINE: "M0-7 1.7-2.2 6.7-2.2 2.7.9 4.1 5.7 0 2.8-4.1 5.7-2.7.9-6.7-2.2-1.7-2.2z",
    "c0": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "c1": "M-4-4h8v8h-8z",
    "c2": "M0-5 5 4h-10z",
    "c3": "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "c4": "M0 5 5-4h-10z",
    "c5": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "": "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0z",
}


def accuracy_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Draw score against measured KV bytes, and write it as an SVG file that follows light and dark mode.

    Parameters
    ----------
    runs : sequence of Run
        Of one data set, length and model.
    path : Path or str
        The file to write.

    Raises
    ------
    InputError
        If the runs are of several data sets, lengths or models, or the bytes of none were measured.
    """
    groups = group_runs(runs)
    if len(groups) != 1:
        raise InputError(f"a figure shows one data set, length and model, got {len(groups)}")
    if not any(map(is_drawn, groups[0].entries)):
        raise InputError("a figure needs a run whose bytes were measured, got none")
    return write_figure(blocks(groups)[0], 0, Path(path))


def write_figure(block: Block, index: int, path: Path) -> Path:
    """Write the figure of one of a block's models as a file of its own, with a size and a ground to stand on."""
    style = (Path(__file__).parent / "figure.css.jinja").read_text(encoding="utf-8")
    ground = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    drawn = draw_accuracy(block, index, f"<style>{style}</style>{ground}")
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SHOWN}" height="{SHOWN * _height(block) // WIDTH}" '
    write_file(path, drawn.replace("<svg ", size, 1) + "\n")
    return path


def draw_accuracy(block: Block, index: int, style: str = "") -> str:
    """Return the figure of one of a block's models as an `svg` element; all text in it is escaped."""
    group, height = block.groups[index], _height(block)
    lines = [(number, row, _points(row, index)) for number, row in enumerate(block.rows)]
    lines = [line for line in lines if line[2]]
    x, y = _axes(group, height - _BELOW)
    # Grey ones lie below.
    ordered = sorted(lines, key=lambda line: (bool(line[1].style), -line[0]))
    methods = [_method(number, row, entries, x, y, group.measure) for number, row, entries in ordered]
    what = f"{measure_name(group.measure)} against KV bytes, {group.title}. The table has the same numbers."
    return "".join(
        [
            f'<svg class="accuracy" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(what)}">',
            style,
            _grid(x, y, group),
            _front(pareto_front(group), x, y),
            *methods,
            _labels(lines, x, y),
            "</svg>",
        ]
    )


def _height(block: Block) -> int:
    return HEIGHT if len(block.groups) == 1 else LOW


def _points(row: Row, index: int) -> list[Entry]:
    """Return the runs of a method that have a place in the figure, from the largest budget to the smallest."""
    places = sorted(place for place in row.runs if place[0] == index)
    return [row.runs[place] for place in places if is_drawn(row.runs[place])]


def _axes(group: Group, bottom: float) -> tuple[Axis, Axis]:
    drawn = [entry for entry in group.entries if is_drawn(entry)]
    shares, scores = [point(entry)[0] for entry in drawn], [entry.summary.score for entry in drawn]
    # A share of nothing would have no place on a log axis.
    low, high = max(min(shares), 0.01), max(*shares, 0.02)
    # A range of three halvings at least.
    wider = max(1.0, (8 / (high / low)) ** 0.5)
    x = Axis(low / wider / 1.12, high * min(wider, 1.4) * 1.08, _LEFT, _RIGHT, log=True)
    if group.measure.unit == "%":
        limits = percent_limits([each.low for each in scores], [each.high for each in scores])
        return x, Axis(*limits, bottom, _TOP)
    means = [each.mean for each in scores]
    return x, Axis(*wide_limits(means), bottom, _TOP)


def _grid(x: Axis, y: Axis, group: Group) -> str:
    across = [f"M{short(_LEFT)} {short(y.place(tick))}H{short(_RIGHT)}" for tick in y.ticks(6)]
    up = [f"M{short(x.place(tick))} {short(_TOP)}V{short(y.start)}" for tick in halvings(x.low, x.high)]
    names = [_text(_LEFT - 6, y.place(tick) + 4, f"{tick:.6g}", "end") for tick in y.ticks(6)]
    names += [_text(x.place(tick), y.start + 17, f"{tick:.4g}%", "middle") for tick in halvings(x.low, x.high)]
    titles = [_text(4, 13, measure_name(group.measure), "start"), _text(_RIGHT, y.start + 38, _X_NAME, "end")]
    return f'<path class="grid" d="{"".join(across + up)}"/><g class="ticks">{"".join(names + titles)}</g>'


def _front(front: Sequence[Entry], x: Axis, y: Axis) -> str:
    """Draw the best score up to each number of bytes as steps, with a ring around each run on it."""
    if len(front) < 2:
        return ""
    places = [_at(entry, x, y) for entry in front]
    steps = f"M{short(places[0][0])} {short(places[0][1])}" + "".join(f"H{short(a)}V{short(b)}" for a, b in places[1:])
    rings = "".join(f'<circle cx="{short(a)}" cy="{short(b)}" r="9"/>' for a, b in places)
    return f'<g class="front"><path d="{steps}"/>{rings}</g>'


def _method(number: int, row: Row, entries: Sequence[Entry], x: Axis, y: Axis, measure: Measure) -> str:
    """Draw a method: a line through its budgets, intervals if it has a colour, and a mark at each run."""
    places = [_at(entry, x, y) for entry in entries]
    line = "M" + " ".join(f"{short(a)} {short(b)}" for a, b in places)
    bars = [f"M{short(a)} {short(y.place(entry.summary.score.low))}V{short(y.place(entry.summary.score.high))}"
            for entry, (a, _) in zip(entries, places, strict=True)]  # fmt: skip
    strokes = f'<path class="line" d="{line}"/>' * (len(places) > 1)
    strokes += f'<path class="bars" d="{"".join(bars)}"/>' * bool(row.style)
    marks = [
        f'<path transform="translate({short(a)} {short(b)})" d="{SHAPES[row.style]}"><title>'
        f"{escape(_tip(row, entry, measure))}</title></path>"
        for entry, (a, b) in zip(entries, places, strict=True)
    ]
    return f'<g class="m {row.style}" data-m="{number}">{strokes}{"".join(marks)}</g>'


def _tip(row: Row, entry: Entry, measure: Measure) -> str:
    asked = f", {100 * (1 - entry.summary.compression_ratio):.4g}% asked for" if entry.summary.press else ""
    return f"{row.label}{asked}: {interval(entry.summary.score, measure)} at {point(entry)[0]:.1f}% of the bytes"


def _at(entry: Entry, x: Axis, y: Axis) -> tuple[float, float]:
    share, score = point(entry)
    return x.place(share), y.place(score)


def _labels(lines: Sequence[tuple[int, Row, list[Entry]]], x: Axis, y: Axis) -> str:
    """Name the coloured methods beside their lines, all if there are few, at the smallest budget if there is room."""
    named = [(number, row, entries) for number, row, entries in lines if row.style or len(lines) <= FEW]
    names = _short_names([row for _, row, _ in named])
    wanted = [(name, [_at(entry, x, y) for entry in reversed(entries)])
              for name, (_, _, entries) in zip(names, named, strict=True)]  # fmt: skip
    points = [_at(entry, x, y) for _, _, entries in lines for entry in entries]
    along = [place for _, places in wanted for place in _along(places)]
    placed = place_labels(wanted, points, along, (_LEFT + 2, _TOP - 8, _RIGHT + 8, y.start - 2))
    texts = [f'<g class="m {row.style}" data-m="{number}">{_text(label.x, label.y, label.text, label.anchor)}</g>'
             for (number, row, _), label in zip(named, placed, strict=True) if isinstance(label, Label)]  # fmt: skip
    return f'<g class="names">{"".join(texts)}</g>'


def _along(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return ten points on each piece of a line."""
    steps = [step / 10 for step in range(10)]
    return [(a + (c - a) * t, b + (d - b) * t) for (a, b), (c, d) in pairwise(places) for t in steps]


def _short_names(rows: Sequence[Row]) -> list[str]:
    """Call methods by what tells them apart: notes where names are shared, and the rest where they begin alike."""
    count = Counter(row.name for row in rows)
    names = [_with_note(row, rows) if count[row.name] > 1 else row.name for row in rows]
    return [_distinct(name, [other for other in names if other != name]) for name in names]


def _with_note(row: Row, rows: Sequence[Row]) -> str:
    """Name a method by what it has that no other of its name has: a cache by that alone, a press also by that."""
    others = {note for other in rows if other is not row and other.name == row.name for note in other.notes}
    note = ", ".join(note for note in row.notes if note not in others).removeprefix("codec=")
    if not note or next(iter(row.runs.values())).summary.press is None:
        return note or row.name
    return f"{_cut(row.name, max(6, _LONGEST - 2 - len(note)))}, {note}"


def _distinct(name: str, others: Sequence[str]) -> str:
    """Cut a name at its end, or also at its beginning if others would look the same."""
    alike = [other for other in others if _cut(other) == _cut(name)]
    if not alike:
        return _cut(name)
    same = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(name, *alike, strict=False)))
    begin = max(0, same - _LONGEST // 3)
    return _cut(f"…{name[begin:]}")


def _cut(name: str, length: int = _LONGEST) -> str:
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{short(x)}" y="{short(y)}" text-anchor="{anchor}">{escape(text)}</text>'
