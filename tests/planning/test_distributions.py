"""Binomial and Poisson probabilities of the planner, against SciPy's."""

import numpy as np
import pytest
from scipy import stats

from pikv_hf.planning.distributions import binomial_tail, poisson_cdf


def rounding(terms: float) -> float:
    """Return the relative error that a sum of so many logarithms may have, if it never exceeds a thousand or two."""
    return 2000 * terms * float(np.finfo(np.float64).eps)


@pytest.mark.parametrize("trials", [0, 1, 31, 8192, 131_072, 10_000_000])
@pytest.mark.parametrize("chance", [0.0, 1e-9, 1 / 128, 0.25, 0.5, 0.999, 1.0])
def test_binomial_tail_from_the_middle_to_twelve_deviations(trials: int, chance: float) -> None:
    deviation = max(1.0, np.sqrt(trials * chance * (1 - chance)))
    more_than = np.unique(np.clip(np.floor(trials * chance + np.linspace(-12, 12, 49) * deviation), -1, trials + 2))
    expected = stats.binom.sf(more_than, trials, chance)
    terms = min(trials, 80 * deviation + 200) + 2
    np.testing.assert_allclose(
        binomial_tail(more_than, trials, chance), expected, rtol=rounding(terms), atol=np.finfo(np.float64).tiny
    )


def test_binomial_tail_of_one_number_is_a_number() -> None:
    assert binomial_tail(1, 2, 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize("mean", [1, 3, 64, 1000])
def test_poisson_cdf(mean: int) -> None:
    last = 2 * mean + 20
    expected = stats.poisson.cdf(np.arange(last + 1), mean)
    np.testing.assert_allclose(poisson_cdf(last, mean), expected, rtol=rounding(last), atol=1e-200)
