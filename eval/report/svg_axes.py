"""Map values to places in an SVG figure, and choose the ticks of an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Steps between ticks, times powers of ten.
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from one value to another, drawn from one place to another.

    Attributes
    ----------
    low, high : float
        Values at its ends.
    start, end : float
        Their places, in units of the figure.
    log : bool
        Whether equal ratios are equally far apart; both values are above 0 then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value is; beyond the ends it is at the end."""
        value = min(max(value, self.low), self.high)
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Return at most so many round values on a linear axis."""
        step = round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def halvings(low: float, high: float) -> list[float]:
    """Return 100 percent halved or doubled, as far as it lies between two values: budgets are asked for so."""
    exponents = range(math.ceil(math.log2(low / 100) - 1e-9), math.floor(math.log2(high / 100) + 1e-9) + 1)
    return [100 * 2.0**exponent for exponent in exponents]


def round_step(least: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))


def percent_limits(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """Room for all intervals, of ten points at least, so that noise alone does not look like a cliff."""
    low, high = min(lows), max(highs)
    margin = max(0.05 * (high - low), (10 - (high - low)) / 2, 1.0)
    return max(-2.0, low - margin), min(102.0, high + margin)


def wide_limits(values: Sequence[float]) -> tuple[float, float]:
    """Room for values of any size, equal ones too."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def short(number: float) -> str:
    """Return a place in an SVG figure with one decimal at most."""
    return f"{number:.1f}".removesuffix(".0")
