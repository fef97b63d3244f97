"""Generate all tasks, sample by sample: the random source of each, the length of each, and no two alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.tasks.ruler.coded_words import coded_words_problem
from pikv_hf.eval.tasks.ruler.common_words import common_words_problem
from pikv_hf.eval.tasks.ruler.counting import TokenCounter
from pikv_hf.eval.tasks.ruler.documents import document_problem
from pikv_hf.eval.tasks.ruler.fitting import Fitted, Problem, TooShortError, fit
from pikv_hf.eval.tasks.ruler.haystack import Haystack, data_folder
from pikv_hf.eval.tasks.ruler.needles import NEEDLE_TASKS, needle_problem
from pikv_hf.eval.tasks.ruler.question_sets import QuestionSet, read_hotpotqa, read_squad
from pikv_hf.eval.tasks.ruler.templates import MAX_NEW_TOKENS, TASKS, family
from pikv_hf.eval.tasks.ruler.variables import variable_problem
from pikv_hf.eval.tasks.sample import EvalSample

# Tokens written and encoded at once: enough for all cores, little enough to hold.
_BATCH_TOKENS = 400_000
# Draws that a sample gets before it is clear that the question set has no more different ones to give.
_DRAWS = 20


@dataclass(frozen=True, slots=True)
class _Run:
    """What all samples of a run share; `sets` are the question sets of the `qa` tasks."""

    counter: TokenCounter
    length: int
    seed: int
    haystack: Haystack
    sets: Mapping[str, QuestionSet]

    def problem(self, task: str, index: int, draw: int) -> Problem:
        """The problem of one sample, a different one for each `draw`."""
        rng = Random(f"{self.seed} {task} {self.length} {index}" + (f" {draw}" if draw else ""))
        if task in NEEDLE_TASKS:
            return needle_problem(NEEDLE_TASKS[task], rng, self.counter, self.haystack, self.length)
        if task == "vt":
            return variable_problem(rng, self.counter, self.length)
        if task == "cwe":
            return common_words_problem(rng, self.counter, self.length)
        if task == "fwe":
            return coded_words_problem(rng, self.counter, self.length)
        questions, order = self.sets[task], f"{self.seed} {task}"
        return document_problem(questions, rng, index, self.counter, self.haystack, self.length, order)

    def fitted(self, task: str, indexes: Sequence[int], draw: int) -> list[Fitted]:
        """Samples of one task, at their final lengths."""
        problems = [self.problem(task, index, draw) for index in indexes]
        try:
            return fit(problems, self.counter, self.length, MAX_NEW_TOKENS[family(task)])
        except TooShortError as error:
            least = self.length + error.missing
            raise ValueError(
                f"length {self.length} is too small for {task}: the least that fits is {least} tokens"
            ) from error

    def samples(self, task: str, count: int) -> Iterator[EvalSample]:
        """The samples of one task."""
        seen: set[tuple[str, str]] = set()
        batch = max(1, _BATCH_TOKENS // self.length)
        for start in range(0, count, batch):
            indexes = range(start, min(start + batch, count))
            for index, fitted in zip(indexes, self._different(task, indexes, seen), strict=True):
                yield _sample(task, index, self.length, fitted)

    def _different(self, task: str, indexes: Sequence[int], seen: set[tuple[str, str]]) -> list[Fitted]:
        """Samples none of which was `seen`, drawn again where one was."""
        found: dict[int, Fitted] = {}
        for draw in range(_DRAWS):
            missing = [index for index in indexes if index not in found]
            for index, fitted in zip(missing, self.fitted(task, missing, draw), strict=True):
                if (text := (fitted.prompt.context, fitted.prompt.question)) not in seen:
                    seen.add(text)
                    found[index] = fitted
            if len(found) == len(indexes):
                return [found[index] for index in indexes]
        raise ValueError(f"{task}: {len(seen)} different samples of {self.length} tokens can be made, not more")


def generate(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int,
    *,
    tasks: Sequence[str] = TASKS,
    seed: int = 42,
    haystack: Haystack | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
    progress: bool = False,
) -> list[EvalSample]:
    """Generate RULER samples (Hsieh et al., 2024, arXiv 2404.06654), without a download.

    A sample's length is what RULER counts: the tokens of context, question and answer prefix, as kvpress's pipeline
    encodes them (chat template included), and of the longest answer. It never exceeds `length`. From 1,024 tokens on it
    is at least 98% of `length`; where whole sentences, needles or documents are too coarse for that, a sentence or
    document is cut at a word, or noise sentences follow the needles.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Tokenizer that the length is counted with.
    length : int
        Tokens of each sample.
    samples : int
        Samples of each task, all different. The first ones are the same however many there are.
    tasks : sequence of str
        Some of `TASKS`; the samples of a task do not depend on the others.
    seed : int
        Of everything random.
    haystack : Haystack, optional
        Running text; by default the bundled essays.
    squad, hotpotqa : path, optional
        Question sets of `qa_1` and `qa_2` in the schemas of SQuAD 2.0 and HotpotQA; by default bundled ones about
        invented places and people. They hold 32 and 45 documents: longer contexts go on with passages of
        the haystack.
    progress : bool
        Show a progress bar on the error stream.

    Returns
    -------
    list of EvalSample
        Task by task, in the order of `tasks`.

    Raises
    ------
    ValueError
        For an unknown task, a number below 1, a length that is too small for a task, or a malformed question set.
    FileNotFoundError
        If a question set does not exist.
    """
    _check(length, samples, tasks)
    sets = _question_sets(tasks, squad, hotpotqa)
    run = _Run(TokenCounter(tokenizer), length, seed, haystack or Haystack.bundled(), sets)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        stream = (sample for task in tasks for sample in run.samples(task, samples))
        return list(bar.track(stream, total=len(tasks) * samples, description=f"RULER {length}"))


def _check(length: int, samples: int, tasks: Sequence[str]) -> None:
    """Refuse what cannot be generated."""
    for name, value in (("length", length), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_tasks(tasks)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse a name that is no task, and one that is given twice."""
    for task in tasks:
        if task not in TASKS:
            hint = did_you_mean(task, TASKS) or f", expected one of {', '.join(TASKS)}"
            raise ValueError(f"unknown RULER task {task!r}{hint}")
        if list(tasks).count(task) > 1:
            raise ValueError(f"RULER task {task!r} is given {list(tasks).count(task)} times, expected once")


def _question_sets(
    tasks: Sequence[str], squad: str | Path | None, hotpotqa: str | Path | None
) -> dict[str, QuestionSet]:
    """Read the sets that the tasks need."""
    readers = {
        "qa_1": lambda: read_squad(squad or data_folder() / "squad.json"),
        "qa_2": lambda: read_hotpotqa(hotpotqa or data_folder() / "hotpotqa.json"),
    }
    return {task: read() for task, read in readers.items() if task in tasks}


def _sample(task: str, index: int, length: int, fitted: Fitted) -> EvalSample:
    """The sample that the rest of the package knows."""
    return EvalSample(
        id=f"{task}-{index:04d}",
        task=task,
        context=fitted.prompt.context,
        question=fitted.prompt.question,
        answer_prefix=fitted.prompt.answer_prefix,
        answers=fitted.answers,
        max_new_tokens=MAX_NEW_TOKENS[family(task)],
        length=length,
        extra=fitted.extra,
    )
