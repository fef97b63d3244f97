"""Stop a run in time: no check or measurement begins once its seconds are spent."""

import time
from collections.abc import Callable

#: The reason given for what a limit left no time for.
NO_TIME = "not run: the time was spent"


class TimeLimit:
    """Seconds to spend, counted from now.

    Parameters
    ----------
    seconds : float
        The whole.
    clock : callable
        Returns seconds since any fixed moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    def spent(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._started

    def is_spent(self) -> bool:
        """Return whether no further case may begin."""
        return self.spent() >= self.seconds
