"""What every evaluation task produces: samples, and the score of an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One question about one context, in the parts that kvpress's pipeline expects.

    Attributes
    ----------
    id : str
        Unique within a run and the same in every run with the same options, such as `vt-0007`.
    task : str
        Name within the suite, such as `niah_single_1` or `narrativeqa`.
    context : str
        What is read once and may be compressed; no special tokens.
    question : str
        What follows the context; may be empty.
    answer_prefix : str
        Beginning of the answer, given to the model; may be empty.
    answers : tuple of str
        References.
    max_new_tokens : int
        Limit of the answer.
    length : int
        What the suite calls the sample's length: tokens asked for (RULER), the data set's own figure (LongBench).
    extra : Mapping
        What only this suite's scores or plots need, such as `all_classes` or a needle's `depth`; JSON values.
    """

    id: str
    task: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    extra: Mapping[str, Any] = field(default_factory=dict)


#: Named scores of one answer, each in [0, 1]; the first one is the task's own and enters all means.
Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The samples of one run and how their answers are scored.

    Attributes
    ----------
    samples : tuple of EvalSample
        In a fixed order.
    score : callable
        From a sample and the text that the model wrote after the answer prefix to named scores.
    bucket : callable, optional
        From a sample to the group that it is reported under, such as LongBench-E's `0-4k`.
    columns : tuple of str
        Entries of every sample's `extra` that become columns of the results, such as a needle grid's `depth`.
    """

    samples: tuple[EvalSample, ...]
    score: Callable[[EvalSample, str], Scores]
    bucket: Callable[[EvalSample], str] | None = None
    columns: tuple[str, ...] = ()
