"""Group the runs that may be shown together: the same questions to the same model."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.summary_file import Measure, Summary

#: A run's label keeps its percentage out of its method's name if it is the ratio rounded to whole percent or closer.
_ROUNDING = 0.6


@dataclass(frozen=True, slots=True)
class Entry:
    """A run within its group.

    Attributes
    ----------
    run : Run
        The run.
    label : str
        Unique in the group.
    method : str
        The label without its compression ratio: runs of one method are the points of one line.
    """

    run: Run
    label: str
    method: str

    @property
    def summary(self) -> Summary:
        """The run's summary."""
        return self.run.summary


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one data set, length and model.

    Attributes
    ----------
    title : str
        Data set, variant and model.
    slug : str
        Unique beginning of the names of the group's files.
    measure : Measure
        What the scores are.
    entries : tuple of Entry
        The baseline first, then by method and ratio.
    """

    title: str
    slug: str
    measure: Measure
    entries: tuple[Entry, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of all runs, in the order in which they first appear."""
        return tuple(dict.fromkeys(task for entry in self.entries for task in entry.summary.tasks))

    def baseline_of(self, entry: Entry) -> Entry | None:
        """Return the run of `DynamicCache` without a press, asked in the same way if there is such a run."""
        baselines = [each for each in self.entries if each.summary.is_baseline]
        alike = [each for each in baselines if each.summary.query_aware == entry.summary.query_aware]
        return next(iter(alike or baselines), None)

    def speed_ratio(self, entry: Entry, name: str) -> float | None:
        """Return a speed of `Cost` relative to the baseline's; None without one that was measured alike."""
        baseline = self.baseline_of(entry)
        if baseline is None or not _measured_alike(baseline.summary, entry.summary):
            return None
        own, reference = getattr(entry.summary.cost, name), getattr(baseline.summary.cost, name)
        return own / reference if own is not None and reference else None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Sort runs into groups by data set, variant, model and measure; numbers in names sort by value."""
    keyed: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        keyed.setdefault(_key(run.summary), []).append(run)
    keys = sorted(keyed, key=lambda key: tuple(map(_natural, key)))
    slugs = _unique(_slug(" ".join(key[:2])) for key in keys)
    return [_group(slug, keyed[key]) for slug, key in zip(slugs, keys, strict=True)]


def model_name(model: str) -> str:
    """Return a Hub name as it is and a folder by its own name alone."""
    return model if model.count("/") == 1 and not model.startswith((".", "/")) else model.rstrip("/").split("/")[-1]


def _key(summary: Summary) -> tuple[str, ...]:
    return (summary.dataset, summary.data_dir, summary.model, summary.measure.name)


def _group(slug: str, runs: Sequence[Run]) -> Group:
    ordered = sorted(runs, key=_order)
    summary = ordered[0].summary
    entries = [
        Entry(run, label, method_of(label, run.summary)) for run, label in zip(ordered, _labels(ordered), strict=True)
    ]
    where = " ".join(part for part in (summary.dataset, summary.data_dir) if part)
    return Group(f"{where}, {model_name(summary.model)}", slug, summary.measure, tuple(entries))


def _order(run: Run) -> tuple[object, ...]:
    what = run.summary
    press = (what.press or "", what.cache, what.query_aware, what.compression_ratio)
    return (not what.is_baseline, *press, what.label, run.folder.name)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Labels, with the folder's name behind those that several runs share."""
    repeated = Counter(run.summary.label for run in runs)
    named = [_label(run, several=repeated[run.summary.label] > 1) for run in runs]
    return _unique(named)


def _label(run: Run, several: bool) -> str:
    return f"{run.summary.label} ({run.folder.name})" if several else run.summary.label


def method_of(label: str, summary: Summary) -> str:
    """Return a label without the percentage that is the run's own compression ratio."""
    for found in re.finditer(r"\s*\b(\d+(?:\.\d+)?)\s*%", label):
        if summary.press and abs(float(found[1]) - 100 * summary.compression_ratio) < _ROUNDING:
            return (label[: found.start()] + label[found.end() :]).strip() or label
    return label


def _unique(names: Iterable[str]) -> list[str]:
    taken: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        taken[next(each for each in itertools.chain([name], numbered) if each not in taken)] = None
    return list(taken)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _measured_alike(one: Summary, other: Summary) -> bool:
    """Whether speeds can be compared: the same machine, dtype, batch size and number of processes."""
    names = ("processor", "cores", "threads", "gpu")
    machines = one.provenance.machine, other.provenance.machine
    return one.conditions == other.conditions and all(machines[0].get(name) == machines[1].get(name) for name in names)
