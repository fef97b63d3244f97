"""Binomial and Poisson probabilities, so that planning needs NumPy alone."""

import math

import numpy as np
import numpy.typing as npt

#: Beyond so many standard deviations, and a hundred more trials, every probability here is below 1e-200.
_REACH = 40


def binomial_tail(more_than: npt.ArrayLike, trials: int, chance: float) -> npt.NDArray[np.float64]:
    """Return the probability of more than so many successes.

    Parameters
    ----------
    more_than : array_like
        Numbers of successes; of each the probability that it is exceeded.
    trials : int
        Independent trials.
    chance : float
        Of a success in each, from 0 to 1.
    """
    first, chances = _binomial(trials, chance)
    # Summed from the smallest on: a sum from the other end, taken from 1, would lose the tail to rounding.
    tails = np.append(np.cumsum(chances[::-1])[::-1], 0.0)
    exceeded = np.floor(np.asarray(more_than, dtype=np.float64)) + 1 - first
    return np.minimum(1.0, tails[np.clip(exceeded, 0, len(chances)).astype(np.int64)])


def poisson_cdf(count: int, mean: float) -> npt.NDArray[np.float64]:
    """Return the probabilities of at most 0, 1, ..., `count` events, of which `mean` > 0 come on average."""
    reach = max(count, math.ceil(mean + _REACH * math.sqrt(mean))) + 100
    chances = _from_ratios(math.log(mean) - np.log(np.arange(1, reach + 1)))
    return np.minimum(1.0, np.cumsum(chances[: count + 1]))


def _binomial(trials: int, chance: float) -> tuple[int, npt.NDArray[np.float64]]:
    """Return the least number of successes whose probability is not negligible, and the probabilities from there on."""
    if not 0 < chance < 1:
        return round(trials * chance), np.ones(1)
    mean = trials * chance
    reach = math.ceil(_REACH * math.sqrt(mean * (1 - chance))) + 100
    first, last = max(0, math.floor(mean) - reach), min(trials, math.ceil(mean) + reach)
    successes = np.arange(first, last, dtype=np.float64)
    odds = math.log(chance) - math.log1p(-chance)
    return first, _from_ratios(np.log(trials - successes) - np.log(successes + 1) + odds)


def _from_ratios(log_ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return probabilities that add up to 1, from the logarithms of the ratio of each to the one before."""
    logs = np.append(0.0, np.cumsum(log_ratios))
    weights = np.exp(logs - logs.max())
    chances: npt.NDArray[np.float64] = weights / weights.sum()
    return chances
