"""Summarise the rows of a run as means with their intervals."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from pikv_hf.eval.runner.folder import Row

_RESAMPLES = 2000
_CONFIDENCE = 0.95

#: Costs that are averaged over samples, and those of which the highest counts.
_MEANS = (
    "kv_bytes_prefill",
    "kv_bytes_end",
    "kv_share_prefill",
    "kv_share_end",
    "kv_share_prefill_dtype",
    "kv_share_end_dtype",
)
_PEAKS = ("peak_memory_bytes", "cuda_peak_bytes")


def interval(groups: Sequence[Sequence[float]], seed: int = 0) -> dict[str, float]:
    """Return the mean of the groups' means with its 95% bootstrap interval (percentile, resampled within groups).

    Parameters
    ----------
    groups : sequence of sequences
        Scores by task. Each task counts alike, however many samples it has.
    seed : int
        Of the resampling.

    Returns
    -------
    dict
        `mean`, `low` and `high`; the interval of a single sample is that sample.
    """
    samples = [np.asarray(group, dtype=float) for group in groups]
    mean = float(np.mean([sample.mean() for sample in samples]))
    # scipy resamples at least two values; a constant has no spread either way.
    if all(sample.min() == sample.max() for sample in samples):
        return {"mean": mean, "low": mean, "high": mean}

    def statistic(*resampled: Any, axis: int = -1) -> Any:
        return np.mean([part.mean(axis=axis) for part in resampled], axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bounds = stats.bootstrap(
            [np.repeat(sample, 2) if len(sample) == 1 else sample for sample in samples],
            statistic,
            n_resamples=_RESAMPLES,
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return {"mean": mean, "low": float(bounds.low), "high": float(bounds.high)}


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by task, in the order in which the tasks first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    return groups


def score_summary(rows: Sequence[Row], shown: Callable[[float], float]) -> dict[str, Any]:
    """Return the mean score over tasks and that of each task, passed through `shown` (a monotone change of scale)."""
    groups = by_task(rows)
    scores = {task: [row["score"] for row in group] for task, group in groups.items()}
    tasks = {
        task: {
            "metric": group[0]["metric"],
            "samples": len(group),
            **_shown(interval([scores[task]]), shown),
        }
        for task, group in groups.items()
    }
    return {"score": _shown(interval(list(scores.values())), shown), "tasks": tasks}


def cost_summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the mean bytes and shares, the speed over all samples, and the highest peaks."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in _MEANS}
    prefill = sum(row["context_tokens"] for row in rows) / sum(row["prefill_seconds"] for row in rows)
    steps, seconds = sum(row["decode_steps"] for row in rows), sum(row["decode_seconds"] for row in rows)
    peaks = {name: _highest([row[name] for row in rows]) for name in _PEAKS}
    return {
        **means,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": steps / seconds if steps else None,
        **peaks,
    }


def _highest(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _shown(bounds: dict[str, float], shown: Callable[[float], float]) -> dict[str, float]:
    return {name: round(shown(value), 4) for name, value in bounds.items()}
