"""Compare two runs on the same samples: what changed, and whether that could be chance."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report.paired import Array, bootstrap_interval, holm, sign_flip_p
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.summary_file import Cost, Measure

OVERALL = "overall"


@dataclass(frozen=True, slots=True)
class Difference:
    """How the scores of one task, or of all tasks together, moved from A to B.

    Attributes
    ----------
    task : str
        The task, or `overall`: the mean over tasks, each weighing the same.
    samples : int
        Pairs.
    mean_a, mean_b : float
        Mean scores of the pairs.
    mean, low, high : float
        B - A with its 95% paired bootstrap interval.
    p_value : float
        Of a paired sign-flip permutation test, two-sided.
    p_holm : float
        The same, corrected for the number of tasks; for `overall` it is `p_value`.
    wins, losses, ties : int
        Pairs in which B is better, worse, equal.
    texts_differ : int
        Pairs whose answers are not the same string.
    """

    task: str
    samples: int
    mean_a: float
    mean_b: float
    mean: float
    low: float
    high: float
    p_value: float
    p_holm: float
    wins: int
    losses: int
    ties: int
    texts_differ: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B against run A, sample by sample.

    Attributes
    ----------
    label_a, label_b : str
        What the runs are called.
    measure : Measure
        What the runs' summaries report.
    unit : str
        Of all differences: `points` of 100, or `nats per token` for a perplexity.
    overall : Difference
        Mean over tasks.
    tasks : tuple of Difference
        By task, in A's order.
    cost_ratios : tuple of (str, float or None)
        Figures of the runs' costs, B divided by A; None where one was not measured. They are of the whole runs.
    only_a, only_b : int
        Samples of one run alone, which are left out.
    """

    label_a: str
    label_b: str
    measure: Measure
    unit: str
    overall: Difference
    tasks: tuple[Difference, ...]
    cost_ratios: tuple[tuple[str, float | None], ...]
    only_a: int
    only_b: int


def compare(a: Run, b: Run, *, allow_partial: bool = False, seed: int = 0) -> Comparison:
    """Compare two runs on the same samples.

    Parameters
    ----------
    a, b : Run
        Differences are B - A.
    allow_partial : bool
        Compare the samples that both runs have, instead of refusing runs with different ones.
    seed : int
        Of resampling.

    Raises
    ------
    InputError
        If the runs are of different data sets or measures, their sample ids differ (unless `allow_partial`), they share
        none, or a sample that both have differs in its task or its references.
    """
    _require_same_set(a, b)
    pairs = _pair(a, b, allow_partial)
    scale, unit = (100.0, "points") if a.summary.measure.unit == "%" else (1.0, "nats per token")
    by_task = {str(task): rows for task, rows in pairs.groupby("task_a", sort=False)}
    better = a.summary.measure.higher_is_better
    tasks = _correct([_difference(task, [rows], scale, better, seed) for task, rows in by_task.items()])
    return Comparison(
        label_a=a.summary.label,
        label_b=b.summary.label,
        measure=a.summary.measure,
        unit=unit,
        overall=_difference(OVERALL, list(by_task.values()), scale, better, seed),
        tasks=tasks,
        cost_ratios=tuple((each.name, _ratio(a, b, each.name)) for each in fields(Cost)),
        only_a=len(a.rows) - len(pairs),
        only_b=len(b.rows) - len(pairs),
    )


def _require_same_set(a: Run, b: Run) -> None:
    for name in ("dataset", "data_dir"):
        one, other = getattr(a.summary, name), getattr(b.summary, name)
        if one != other:
            raise InputError(f"{name} is {one!r} in {a.folder} and {other!r} in {b.folder}, expected the same")
    if a.summary.measure != b.summary.measure:
        one, other = a.summary.measure.name, b.summary.measure.name
        raise InputError(f"{a.folder} measures {one} and {b.folder} {other}, expected the same")


def _pair(a: Run, b: Run, allow_partial: bool) -> pd.DataFrame:
    """The rows of both runs side by side, in A's order."""
    columns = ["id", "task", "answer", "predicted_answer", "score"]
    pairs = a.rows[columns].merge(b.rows[columns], on="id", suffixes=("_a", "_b"), validate="one_to_one")
    counts = f"{len(a.rows)} in {a.folder}, {len(b.rows)} in {b.folder}, {len(pairs)} in both"
    if pairs.empty:
        raise InputError(f"the runs share no sample ids: {counts}")
    if not allow_partial and not len(a.rows) == len(b.rows) == len(pairs):
        raise InputError(f"sample ids differ: {counts}; allow a partial comparison to compare only those")
    for column, what in (("task", "task"), ("answer", "references")):
        _require_equal(pairs, column, what)
    return pairs


def _require_equal(pairs: pd.DataFrame, column: str, what: str) -> None:
    different = pairs[pairs[f"{column}_a"] != pairs[f"{column}_b"]]
    if len(different):
        row = different.iloc[0]
        values = f"{row[f'{column}_a'][:80]!r} and {row[f'{column}_b'][:80]!r}"
        raise InputError(f"{what} of {len(different)} samples differ, first of id {row['id']}: {values}")


def _difference(task: str, tasks: Sequence[pd.DataFrame], scale: float, better: bool, seed: int) -> Difference:
    differences = [_scores(rows, "b", scale) - _scores(rows, "a", scale) for rows in tasks]
    low, high = bootstrap_interval(differences, seed)
    p_value = sign_flip_p(differences, seed)
    gains = np.concatenate(differences) * (1 if better else -1)
    return Difference(
        task=task,
        samples=len(gains),
        mean_a=_mean_of_means([_scores(rows, "a", scale) for rows in tasks]),
        mean_b=_mean_of_means([_scores(rows, "b", scale) for rows in tasks]),
        mean=_mean_of_means(differences),
        low=low,
        high=high,
        p_value=p_value,
        p_holm=p_value,
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        ties=int((gains == 0).sum()),
        texts_differ=sum(int((rows["predicted_answer_a"] != rows["predicted_answer_b"]).sum()) for rows in tasks),
    )


def _correct(tasks: Sequence[Difference]) -> tuple[Difference, ...]:
    corrected = holm([task.p_value for task in tasks])
    return tuple(replace(task, p_holm=p_holm) for task, p_holm in zip(tasks, corrected, strict=True))


def _scores(rows: pd.DataFrame, side: str, scale: float) -> Array:
    return rows[f"score_{side}"].to_numpy(dtype=np.float64) * scale


def _mean_of_means(values: Sequence[Array]) -> float:
    return float(np.mean([each.mean() for each in values]))


def _ratio(a: Run, b: Run, name: str) -> float | None:
    reference, value = getattr(a.summary.cost, name), getattr(b.summary.cost, name)
    return value / reference if reference and value is not None else None
