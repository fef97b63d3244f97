"""A haystack with statements hidden between its units: needles and variable tracking."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from random import Random
from typing import Any

from pikv_hf.eval.reference.synthetic.text import NOISE_SENTENCES
from pikv_hf.eval.tasks.ruler.counting import Pieces, TokenCounter
from pikv_hf.eval.tasks.ruler.templates import NOISE_LINE

#: From a number of units to the gaps that the statements go into, in ascending order.
Places = Callable[[int], list[int]]


@dataclass(frozen=True, slots=True)
class Scattered:
    """Units of a haystack with statements between them.

    Attributes
    ----------
    lead : str
        What stands before the haystack.
    statements : tuple of str
        What is hidden, in order.
    units : Pieces
        Haystack, from its first unit.
    joiner : str
        Between units and statements: a space in running text, a newline between lines.
    places : callable
        Where the statements go.
    base : int
        Tokens of everything but the units.
    counter : TokenCounter
        For the tail.
    asked : tuple of int
        Statements that hold the answers, in order of the answers.
    """

    lead: str
    statements: tuple[str, ...]
    units: Pieces
    joiner: str
    places: Places
    base: int
    counter: TokenCounter
    asked: tuple[int, ...] = ()

    @property
    def least(self) -> int:
        """No haystack at all."""
        return 0

    @property
    def largest(self) -> int:
        """All units."""
        return len(self.units)

    def cost(self, size: int) -> int:
        """Estimated tokens with the first `size` units."""
        return self.base + self.units.reach[size]

    def tail(self, size: int, room: int) -> tuple[str, int]:
        """Words of the next sentence in running text; noise sentences after lines, which must not be cut."""
        if self.joiner == " " and size < len(self.units):
            return self.counter.take(self.units.texts[size].split(), room, self.joiner)
        return self.counter.take(NOISE_SENTENCES * 8, room, self.joiner)

    def context(self, size: int, tail: str) -> str:
        """Lead, haystack and statements, ending with a newline."""
        lines: list[str] = []
        start = 0
        for place, statement in zip(self.places(size), self.statements, strict=True):
            lines += [*self.units.texts[start:place], statement]
            start = place
        lines += [*self.units.texts[start:size], *([tail] if tail else [])]
        return f"{self.lead}{self.joiner.join(lines)}\n"

    def extra(self, size: int) -> Mapping[str, Any]:
        """Share of the haystack before each statement that holds an answer."""
        places = self.places(size)
        depths = [places[index] / size if size else 0.0 for index in self.asked]
        return {"depth": depths[0]} if len(depths) == 1 else {"depths": depths}


def scatter(
    counter: TokenCounter,
    lead: str,
    statements: Sequence[str],
    units: Iterable[str],
    budget: int,
    *,
    joiner: str,
    places: Places,
    asked: Sequence[int] = (),
) -> Scattered:
    """Prepare a haystack with statements for any length up to about `budget` tokens."""
    # A quarter more than the budget, since the estimate may be too high.
    gathered = counter.gather(units, budget + budget // 4, joiner)
    base = counter.cost(lead, "") + sum(counter.costs(statements, joiner))
    return Scattered(lead, tuple(statements), gathered, joiner, places, base, counter, tuple(asked))


def noise_lines() -> Iterator[str]:
    """RULER's five noise sentences on one line, over and over."""
    return repeat(NOISE_LINE)


def random_places(rng: Random, count: int) -> Places:
    """`count` different gaps drawn at random among all but the last."""
    seed = rng.getrandbits(64)
    return lambda units: [min(gap, units) for gap in sorted(Random(seed).sample(range(max(units, count)), count))]
