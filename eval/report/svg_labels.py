"""Find places for labels beside points, where they cover neither points nor one another."""

from collections.abc import Sequence
from dataclasses import dataclass

#: Units of the figure: of a letter, and of a line of letters.
LETTER, LINE = 7.3, 13.0
#: From a point to its label.
_GAP = 8.0
#: Half the width of what a label must not cover around a point.
_POINT = 4.0

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Label:
    """Where text goes: `x` is its beginning, middle or end, as `anchor` says, and `y` its base line."""

    text: str
    x: float
    y: float
    anchor: str


def place_labels(
    wanted: Sequence[tuple[str, Sequence[Point]]], points: Sequence[Point], lines: Sequence[Point], frame: Box
) -> list[Label | None]:
    """Return a place for each text beside one of its points; None where there is no room.

    Of the places that cover neither points nor labels it is the one that covers the least of lines.

    Parameters
    ----------
    wanted : sequence of (str, sequence of (float, float))
        Texts with their points, the preferred first; texts that come first are placed first.
    points : sequence of (float, float)
        All that must stay visible.
    lines : sequence of (float, float)
        Points along what should stay visible.
    frame : tuple of float
        Left, top, right and bottom of the room.
    """
    taken: list[Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    placed: list[Label | None] = []
    for text, own in wanted:
        fitting = [label for label in _candidates(text, own) if _fits(_box(label), taken, frame)]
        free = min(fitting, key=lambda label: _covered(_box(label), lines), default=None)
        placed.append(free)
        if free is not None:
            taken.append(_box(free))
    return placed


def _candidates(text: str, own: Sequence[Point]) -> list[Label]:
    """Left of each point, then below, above and right of it, then further away."""
    near = [label for x, y in own for label in _around(text, x, y, 0.0)]
    return near + [label for shift in (LINE, 2 * LINE) for x, y in own for label in _around(text, x, y, shift)]


def _around(text: str, x: float, y: float, shift: float) -> list[Label]:
    middle = y + LINE / 3
    sides = [(x - _GAP, "end"), (x + _GAP, "start")]
    if shift:
        return [Label(text, at, middle + sign * shift, anchor) for at, anchor in sides for sign in (1, -1)]
    left, right = (Label(text, at, middle, anchor) for at, anchor in sides)
    below, above = Label(text, x, y + _GAP + LINE, "middle"), Label(text, x, y - _GAP - 1, "middle")
    return [left, below, above, right]


def _box(label: Label) -> Box:
    width = LETTER * len(label.text)
    left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return left, label.y - 0.8 * LINE, left + width, label.y + 0.2 * LINE


def _covered(box: Box, lines: Sequence[Point]) -> int:
    return sum(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in lines)


def _fits(box: Box, taken: Sequence[Box], frame: Box) -> bool:
    inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
    return inside and not any(
        box[0] < right and left < box[2] and box[1] < bottom and top < box[3] for left, top, right, bottom in taken
    )
