"""Read `summary.json` of one result folder, checked field by field."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pikv_hf.eval.errors import InputError

#: Fields beside the machine's that speed depends on.
CONDITIONS = ("dtype", "batch_size", "processes")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% bootstrap interval, in the unit of the run's measure."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The score of one task: the metric's name, how many samples, and the mean over them."""

    metric: str
    samples: int
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Measure:
    """What the scores of a run are: its name, its unit (`%` or empty) and its good end."""

    name: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """Memory and speed of a run, means over its samples; None where it was not measured.

    Attributes
    ----------
    kv_bytes_prefill, kv_bytes_end : float or None
        Live bytes of the cache after the context was read and after the answer.
    kv_share_prefill, kv_share_end : float or None
        The same, divided by what `DynamicCache` would hold in bf16.
    kv_share_prefill_dtype, kv_share_end_dtype : float or None
        The same, divided by what `DynamicCache` would hold in the model's own dtype.
    prefill_tokens_per_s, decode_tokens_per_s : float or None
        Speed.
    peak_memory_bytes, cuda_peak_bytes : float or None
        Peak of the process and of the GPU.
    """

    kv_bytes_prefill: float | None
    kv_bytes_end: float | None
    kv_share_prefill: float | None
    kv_share_end: float | None
    kv_share_prefill_dtype: float | None
    kv_share_end_dtype: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    peak_memory_bytes: float | None
    cuda_peak_bytes: float | None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a run comes from; None for what is unknown, versions by package."""

    command: str
    date: str
    commit: str | None
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """What `pikv eval` writes about a finished run.

    Attributes
    ----------
    dataset, data_dir, model : str
        What was asked of whom.
    cache : str
        `dynamic` is transformers' `DynamicCache`.
    press : str or None
        The press as it was asked for, such as `AdaKVPress(SnapKVPress)`; None without one.
    compression_ratio : float
        Share of the tokens that the press was asked to drop.
    query_aware : bool
        Whether the press saw the question.
    label : str
        What tables call the run.
    samples : int
        Questions asked.
    measure : Measure
        What the scores are.
    score : Estimate
        Mean over tasks.
    tasks : Mapping
        Scores by task.
    cost : Cost
        Memory and speed.
    conditions : Mapping
        What else speed depends on: `dtype`, `batch_size` and `processes`, None where the file does not say.
    provenance : Provenance
        Machine, versions, commit, command, date.
    """

    dataset: str
    data_dir: str
    model: str
    cache: str
    press: str | None
    compression_ratio: float
    query_aware: bool
    label: str
    samples: int
    measure: Measure
    score: Estimate
    tasks: Mapping[str, TaskScore]
    cost: Cost
    conditions: Mapping[str, Any]
    provenance: Provenance

    @property
    def is_baseline(self) -> bool:
        """Whether this is `DynamicCache` without a press."""
        return self.cache == "dynamic" and self.press is None


def read_summary(path: Path) -> Summary:
    """Read and check one `summary.json`.

    Raises
    ------
    InputError
        If it is not a JSON object or a field is missing or of another type; the message names file and field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return _summary(_Fields(path, content))


@dataclass(frozen=True, slots=True)
class _Fields:
    """An object of the file, with the names that lead to it for messages."""

    path: Path
    content: Mapping[str, Any]
    parents: tuple[str, ...] = field(default=())

    def inside(self, name: str) -> "_Fields":
        return _Fields(self.path, self._typed(name, dict, "an object"), (*self.parents, name))

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self.inside(name).content

    def text(self, name: str) -> str:
        return one_line(self._typed(name, str, "a string"))

    def text_or_none(self, name: str) -> str | None:
        return None if self._get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def count(self, name: str) -> int:
        value = self._get(name)
        if type(value) is not int or value < 0:
            raise self._wrong(name, value, "a count")
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        # bool is an int to Python, and json reads NaN and Infinity.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        return None if self._get(name) is None else self.number(name)

    def _typed(self, name: str, kind: type, expected: str) -> Any:
        value = self._get(name)
        if not isinstance(value, kind):
            raise self._wrong(name, value, expected)
        return value

    def _get(self, name: str) -> Any:
        if name not in self.content:
            raise InputError(f"{self.path}: field {self._name(name)} is missing")
        return self.content[name]

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self.path}: field {self._name(name)} is {value!r}, expected {expected}")

    def _name(self, name: str) -> str:
        return ".".join((*self.parents, name))


def one_line(text: str) -> str:
    """Return text without line breaks, control characters and lone surrogates, which no output could hold."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())


def _summary(found: _Fields) -> Summary:
    tasks, measure = found.inside("tasks"), found.inside("measure")
    return Summary(
        dataset=found.text("dataset"),
        data_dir=found.text_or_none("data_dir") or "",
        model=found.text("model"),
        cache=found.text("cache"),
        press=found.text_or_none("press"),
        compression_ratio=found.number_or_none("compression_ratio") or 0.0,
        query_aware=found.flag("query_aware"),
        label=found.text("label"),
        samples=found.count("samples"),
        measure=Measure(measure.text("name"), measure.text("unit"), measure.flag("higher_is_better")),
        score=_estimate(found.inside("score")),
        tasks={one_line(name): _task(tasks.inside(name)) for name in tasks.content},
        cost=_cost(found.inside("cost")),
        conditions={name: found.content.get(name) for name in CONDITIONS},
        provenance=_provenance(found.inside("provenance")),
    )


def _estimate(found: _Fields) -> Estimate:
    return Estimate(found.number("mean"), found.number("low"), found.number("high"))


def _task(found: _Fields) -> TaskScore:
    return TaskScore(found.text("metric"), found.count("samples"), _estimate(found))


def _cost(found: _Fields) -> Cost:
    return Cost(**{each.name: found.number_or_none(each.name) for each in fields(Cost)})


def _provenance(found: _Fields) -> Provenance:
    return Provenance(
        command=found.text("command"),
        date=found.text("date"),
        commit=found.text_or_none("commit"),
        machine=found.mapping("machine"),
        versions=found.mapping("versions"),
    )
