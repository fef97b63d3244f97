"""RULER in the words that the bundled reference model knows: the seven tasks it can do at full cache.

Haystacks, needles and questions are RULER's (Hsieh et al., 2024, arXiv 2404.06654) with the model's own word lists,
numbers of four digits and one value per question where RULER asks for one. Multi-key samples hide eight needles.
Variable tracking asks for the chain behind a variable; since the answer prefix and the chain's form alone earn partial
credit there, only an exact match counts.
"""

import random
from collections.abc import Sequence

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.reference.synthetic import make_sample
from pikv_hf.eval.tasks.sample import EvalSample, Scores

#: RULER's name, and task and haystack of :mod:`pikv_hf.eval.reference.synthetic`.
_TASKS: dict[str, tuple[str, str]] = {
    "niah_single_1": ("single", "noise"),
    "niah_single_2": ("single", "essay"),
    "niah_multikey_1": ("multikey", "essay"),
    "niah_multikey_2": ("multikey", "needles"),
    "niah_multivalue": ("multivalue", "essay"),
    "niah_multiquery": ("multiquery", "essay"),
    "vt": ("vt", "noise"),
}
TASKS = tuple(_TASKS)

#: The longest expected answer has 29 tokens; a wrong one may be longer.
MAX_NEW_TOKENS = 48


def generate(length: int, samples: int, *, tasks: Sequence[str] = TASKS, seed: int = 42) -> list[EvalSample]:
    """Return `samples` of each task, prompt and expected answer together at most `length` reference tokens.

    Raises
    ------
    InputError
        If a task is not one of `TASKS`, or the length is too short for one.
    """
    for task in tasks:
        if task not in _TASKS:
            hint = did_you_mean(task, TASKS)
            raise InputError(f"the reference model's suite has no task {task!r}{hint} (it has: {', '.join(TASKS)})")
    return [_sample(task, length, seed, index) for task in tasks for index in range(samples)]


def _sample(task: str, length: int, seed: int, index: int) -> EvalSample:
    kind, haystack = _TASKS[task]
    try:
        sample = make_sample(kind, length, random.Random(f"ruler {seed} {task} {length} {index}"), haystack)
    except ValueError as error:
        raise InputError(f"{task} does not fit into --length {length}: {error}") from None
    return EvalSample(
        id=f"{task}-{index:04d}",
        task=task,
        context=sample.context,
        question=sample.question,
        answer_prefix=sample.answer_prefix,
        answers=sample.answers,
        max_new_tokens=MAX_NEW_TOKENS,
        length=length,
        extra={"exact": sample.answer},
    )


def score(sample: EvalSample, prediction: str) -> Scores:
    """Return RULER's string match, or for variable tracking the exact match first; both are in the result."""
    exact = float(prediction.strip().removesuffix(".").strip() == sample.extra["exact"])
    found = sum(answer.lower() in prediction.lower() for answer in sample.answers) / len(sample.answers)
    scores = {"string_match": found, "exact_match": exact}
    return dict(reversed(scores.items())) if sample.task == "vt" else scores
