"""Make evaluation and demo samples: one question about one haystack, in the parts that pipelines expect."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pikv_hf.eval.reference.synthetic import tasks
from pikv_hf.eval.reference.synthetic.tasks import Document, Plan
from pikv_hf.eval.reference.synthetic.words import KEYS

#: Needles of the multikey and multiquery samples, like RULER's 8 distractor keys scaled to short contexts.
NEEDLES = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one haystack.

    Attributes
    ----------
    task : str
        One of :data:`pikv_hf.eval.reference.synthetic.tasks.TASKS`.
    haystack : str
        Kind of filler, one of :data:`pikv_hf.eval.reference.synthetic.text.HAYSTACKS`.
    context : str
        Preamble, haystack and a closing newline, without ``<bos>``.
    question : str
        The question, without a newline.
    answer_prefix : str
        Beginning of the answer, given to the model.
    answer : str
        The expected continuation, up to its closing full stop (exact match).
    answers : tuple[str, ...]
        References of RULER's string match: the score is the share of them contained in the output.
    """

    task: str
    haystack: str
    context: str
    question: str
    answer_prefix: str
    answer: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The whole prompt, without ``<bos>`` (the reference tokenizer adds it by default)."""
        return f"{self.context}{self.question}\n{self.answer_prefix}"

    def exact(self, output: str) -> bool:
        """Whether ``output`` (text after the prompt, special tokens removed) is exactly the expected answer."""
        return output.strip().removesuffix(".").strip() == self.answer

    def string_match(self, output: str) -> float:
        """RULER's ``string_match_all``: share of references contained in ``output``, in [0, 1]."""
        return sum(reference.lower() in output.lower() for reference in self.answers) / len(self.answers)


def document_samples(document: Document, haystack: str) -> list[Sample]:
    """Every question of a document as a sample of its own; all share the same context string."""
    return [
        Sample(q.task, haystack, document.context, q.text, q.answer_prefix, q.answer, q.references)
        for q in document.questions
    ]


def _plan_single(rng: random.Random) -> Plan:
    return tasks.plan_pairs(rng, needles=1)


def _plan_multikey(rng: random.Random) -> Plan:
    return tasks.plan_pairs(rng, needles=NEEDLES)


def _plan_multiquery(rng: random.Random) -> Plan:
    return tasks.plan_queries(rng, needles=NEEDLES)


_PLANNERS: dict[str, Callable[[random.Random], Plan]] = {
    "single": _plan_single,
    "multikey": _plan_multikey,
    "multivalue": tasks.plan_values,
    "multiquery": _plan_multiquery,
    "vt": tasks.plan_variables,
}


def make_sample(
    task: str, n_tokens: int, rng: random.Random, haystack: str = "essay", depth: float | None = None
) -> Sample:
    """One evaluation sample of at most ``n_tokens`` tokens, prompt and expected answer together.

    ``single`` hides 1 needle, ``multikey`` and ``multiquery`` 8 (with ``haystack="needles"`` as many as fit),
    ``multivalue`` one key with 4 values and one other needle, ``vt`` one chain of 5 variables (4 hops).

    With ``depth``, in [0, 1], what is hidden stands together behind that share of the text.

    Raises
    ------
    ValueError
        If the task or haystack is unknown, or the needles and the question do not fit.
    """
    if task not in _PLANNERS:
        raise ValueError(f"unknown task {task!r}, expected one of {tasks.TASKS}")
    document = tasks.hide(_PLANNERS[task](rng), n_tokens, rng, haystack, depth)
    return document_samples(document, haystack)[0]


def make_shared_samples(
    n_tokens: int, rng: random.Random, haystack: str = "essay", needles: int = NEEDLES, questions: int = 6
) -> list[Sample]:
    """Several questions about one haystack: each needle on its own, the last question four needles at once.

    Parameters
    ----------
    n_tokens : int
        Tokens of the context together with all questions and answers.
    rng : random.Random
        Source of all randomness.
    haystack : str
        Kind of filler.
    needles : int
        Keys hidden in the haystack, at least four.
    questions : int
        Samples to return, at most ``needles + 1``; the last one is a ``multiquery``.

    Raises
    ------
    ValueError
        If there are too few needles for the questions or they do not fit.
    """
    if needles < tasks.KEYS_PER_QUERY or not 1 <= questions <= needles + 1:
        raise ValueError(
            f"{questions} questions need at least {max(tasks.KEYS_PER_QUERY, questions - 1)} needles, got {needles}"
        )
    pairs = tasks.random_pairs(rng, KEYS, needles)
    asked = [tasks.single_question(*pair) for pair in rng.sample(pairs, questions - 1)]
    asked.append(tasks.keys_question(rng.sample(pairs, tasks.KEYS_PER_QUERY)))
    plan = tasks.plan_needles(pairs, asked)
    return document_samples(tasks.hide(plan, n_tokens, rng, haystack), haystack)
