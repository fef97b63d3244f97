"""Test paired differences: sign-flip permutation test, bootstrap interval, correction for many tests."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

#: Random sign flips and resamples; up to 13 pairs that differ are enumerated instead, since 2**13 is below this.
RESAMPLES = 9999
CONFIDENCE = 0.95
#: Numbers held at once while resampling, 32 MB.
_BATCH_NUMBERS = 4_000_000

Array = NDArray[np.float64]


def sign_flip_p(differences: Sequence[Array], seed: int = 0) -> float:
    """Return the two-sided p-value of the mean over tasks of mean differences, by flipping the signs of pairs.

    Parameters
    ----------
    differences : sequence of array, each `(n_task,)` float64
        One array per task; tasks weigh equally.
    seed : int
        Of the random flips, where there are too many to try all.

    Notes
    -----
    Under the null hypothesis the two runs are exchangeable within a pair, so each difference is as likely with either
    sign (Fisher's randomisation test). Pairs without a difference have no sign and are left out, which changes nothing
    and often makes the test exact.
    """
    shares = np.concatenate([values / len(values) for values in differences])
    signed = shares[shares != 0]
    if not len(signed):
        return 1.0
    if len(signed) == 1:
        return 1.0  # Both flips are as far from zero; scipy wants two observations.
    result = stats.permutation_test(
        (signed,),
        _sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(signed),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def bootstrap_interval(differences: Sequence[Array], seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean over tasks of mean differences, resampling pairs within tasks.

    Where no task has two different values, the interval is a point.
    """
    if all(np.ptp(values) == 0 for values in differences):
        point = float(np.mean([values[0] for values in differences]))
        return point, point
    # scipy wants two observations per task; a single one, taken twice, has the same bootstrap distribution.
    samples = [values if len(values) > 1 else np.repeat(values, 2) for values in differences]
    result = stats.bootstrap(
        samples,
        _mean_of_means,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=_batch(*samples),
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values corrected for their number, in the same order (Holm 1979): they bound the family-wise error."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return tuple(corrected)


def _sum(values: Array, axis: int) -> Array:
    return np.sum(values, axis=axis)


def _mean_of_means(*samples: Array, axis: int) -> Array:
    return np.mean([values.mean(axis=axis) for values in samples], axis=0)


def _batch(*samples: Array) -> int:
    return max(1, _BATCH_NUMBERS // max(len(values) for values in samples))
