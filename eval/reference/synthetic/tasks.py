"""Documents of the five retrieval tasks: one haystack with its needles and the questions that can be asked about it.

Everything is drawn from the ``random.Random`` passed in, so a seed fixes the text. Lengths are tokens of the reference
tokenizer (:mod:`pikv_hf.eval.reference.tokenizer`).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pikv_hf.eval.reference.synthetic import text
from pikv_hf.eval.reference.synthetic.words import KEYS

TASKS = ("single", "multikey", "multivalue", "multiquery", "vt")
VALUES_PER_KEY = 4
KEYS_PER_QUERY = 4


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a document.

    Attributes
    ----------
    task : str
        One of :data:`TASKS`.
    text : str
        The question, without a newline.
    answer_prefix : str
        Beginning of the answer, given to the model (RULER's convention).
    answer : str
        What a perfect model writes after the prefix, without the closing full stop.
    references : tuple[str, ...]
        Strings of which RULER's string match counts the share that the answer contains.
    """

    task: str
    text: str
    answer_prefix: str
    answer: str
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Question and answer prefix as they follow the context."""
        return f"{self.text}\n{self.answer_prefix}"

    @property
    def ending(self) -> str:
        """What follows the prompt in a training document."""
        return f" {self.answer}.<eos>"

    @property
    def tokens(self) -> int:
        """Tokens of one complete round, ``<eos>`` included."""
        return text.count_tokens(self.prompt) + text.count_tokens(self.ending)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a document must say and may be asked, before it is hidden in a haystack.

    Attributes
    ----------
    preamble : str
        First line of the document.
    statements : tuple[str, ...]
        Sentences to hide; their order is kept.
    questions : tuple[Question, ...]
        Questions in the order in which they are asked.
    distractors : callable
        Endless or finite sentences of the same form for a haystack of kind ``"needles"``.
    """

    preamble: str
    statements: tuple[str, ...]
    questions: tuple[Question, ...]
    distractors: Callable[[random.Random], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Document:
    """A haystack with needles, and questions about it. ``context`` ends with a newline and has no ``<bos>``."""

    context: str
    questions: tuple[Question, ...]

    @property
    def tokens(self) -> int:
        """Tokens with ``<bos>`` and all rounds of questions and answers."""
        return 1 + text.count_tokens(self.context) + sum(question.tokens for question in self.questions)


def single_question(key: str, value: str, task: str = "multikey") -> Question:
    """Ask for the only number of ``key``."""
    return Question(task, *text.ask_one(key), answer=value, references=(value,))


def values_question(key: str, values: Sequence[str]) -> Question:
    """Ask for all numbers of ``key``; the answer lists them in order of appearance."""
    return Question("multivalue", *text.ask_all([key]), answer=", ".join(values), references=tuple(values))


def keys_question(pairs: Sequence[tuple[str, str]]) -> Question:
    """Ask for the numbers of several keys at once."""
    answer = ", ".join(f"{key}: {value}" for key, value in pairs)
    keys = [key for key, _ in pairs]
    return Question("multiquery", *text.ask_all(keys), answer=answer, references=tuple(value for _, value in pairs))


def variable_question(chain: Sequence[str], value: str) -> Question:
    """Ask for the value of the last variable of ``chain``, through all variables before it."""
    *sources, variable = chain
    answer = " = ".join([*(f"VAR {source}" for source in reversed(sources)), value])
    return Question("vt", *text.ask_variable(variable), answer=answer, references=(*reversed(sources), value))


def plan_needles(pairs: Sequence[tuple[str, str]], questions: Sequence[Question], keys: Sequence[str] = KEYS) -> Plan:
    """Given (key, value) needles and questions about them; distractors take their keys from the rest of ``keys``."""
    used, values = {key for key, _ in pairs}, {value for _, value in pairs}
    one = len(questions) == 1 and len(questions[0].references) == 1
    return Plan(
        text.PREAMBLE_ONE if one else text.PREAMBLE_MANY,
        tuple(text.needle(*pair) for pair in pairs),
        tuple(questions),
        lambda rng: text.needle_sentences(rng, _without(keys, used), values),
    )


def random_pairs(rng: random.Random, keys: Sequence[str], count: int) -> list[tuple[str, str]]:
    """``count`` distinct keys with a distinct value each."""
    return list(zip(rng.sample(list(keys), count), text.random_values(rng, count), strict=True))


def plan_pairs(rng: random.Random, keys: Sequence[str] = KEYS, *, needles: int = 1, rounds: int = 1) -> Plan:
    """``needles`` keys with a number each, of which ``rounds`` are asked for one by one (single, multikey)."""
    pairs = random_pairs(rng, keys, needles)
    task = "single" if needles == 1 else "multikey"
    return plan_needles(pairs, [single_question(*pair, task) for pair in rng.sample(pairs, rounds)], keys)


def plan_queries(rng: random.Random, keys: Sequence[str] = KEYS, *, needles: int = 8, rounds: int = 1) -> Plan:
    """``needles`` keys with a number each; every round asks for four of them at once (multiquery)."""
    pairs = random_pairs(rng, keys, needles)
    return plan_needles(pairs, [keys_question(rng.sample(pairs, KEYS_PER_QUERY)) for _ in range(rounds)], keys)


def plan_values(rng: random.Random, keys: Sequence[str] = KEYS, *, groups: int = 1, distractors: int = 1) -> Plan:
    """``groups`` keys with four numbers each, all asked for, among ``distractors`` keys with one (multivalue)."""
    names = rng.sample(list(keys), groups + distractors)
    values = text.random_values(rng, groups * VALUES_PER_KEY + distractors)
    owners = [name for name in names[:groups] for _ in range(VALUES_PER_KEY)] + names[groups:]
    rng.shuffle(owners)
    pairs = list(zip(owners, values, strict=True))
    questions = [values_question(name, [v for key, v in pairs if key == name]) for name in names[:groups]]
    return plan_needles(pairs, questions, keys)


def plan_variables(
    rng: random.Random, keys: Sequence[str] = KEYS, *, hops: Sequence[int] = (4,), rounds: int = 1
) -> Plan:
    """One chain of variables per entry of ``hops``; the first round asks for the end of the first chain (vt).

    Further rounds ask for other variables anywhere in the chains. The chains are interleaved, each in its own order.
    """
    names = iter(rng.sample(list(keys), sum(hops) + len(hops)))
    chains = [list(itertools.islice(names, length + 1)) for length in hops]
    values = text.random_values(rng, len(chains))
    valued = list(zip(chains, values, strict=True))
    asked = [(chain[: end + 1], value) for chain, value in valued for end in range(len(chain))]
    first = asked.pop(hops[0])
    rounds_asked = [first, *rng.sample(asked, min(rounds - 1, len(asked)))]
    return Plan(
        text.PREAMBLE_VARIABLES,
        tuple(_interleave(rng, [_chain_statements(*pair) for pair in valued])),
        tuple(variable_question(*question) for question in rounds_asked),
        lambda source: text.assignment_sentences(source, _without(keys, itertools.chain(*chains)), set(values)),
    )


def hide(
    plan: Plan, n_tokens: int, rng: random.Random, haystack: str = "essay", depth: float | None = None
) -> Document:
    """Hide the plan's statements in a haystack.

    Parameters
    ----------
    plan : Plan
        What the document must say and is asked.
    n_tokens : int
        Tokens of the whole document: ``<bos>``, context and all rounds of questions and answers. The result is at most
        this long and shorter by less than one sentence (unless the distractors of ``"needles"`` run out).
    rng : random.Random
        Source of the filler sentences and depths.
    haystack : str
        One of :data:`pikv_hf.eval.reference.synthetic.text.HAYSTACKS`.
    depth : float, optional
        Share of the filler before the statements, in [0, 1]; by default each has a random one.

    Raises
    ------
    ValueError
        If the kind of haystack is unknown or the statements and questions alone are longer than ``n_tokens``.
    """
    fixed = Document(f"{plan.preamble}\n{' '.join(plan.statements)}\n", plan.questions).tokens
    if fixed > n_tokens:
        raise ValueError(f"statements and questions take {fixed} tokens, more than the {n_tokens} asked for")
    filler = _take_tokens(_filler(plan, rng, haystack), n_tokens - fixed)
    sentences = _scatter(rng, plan.statements, filler) if depth is None else _insert(plan.statements, filler, depth)
    return Document(f"{plan.preamble}\n{' '.join(sentences)}\n", plan.questions)


def _filler(plan: Plan, rng: random.Random, haystack: str) -> Iterator[str]:
    """Filler sentences of one kind."""
    if haystack == "noise":
        return text.noise_sentences()
    if haystack == "essay":
        return text.essay_sentences(rng)
    if haystack == "needles":
        return plan.distractors(rng)
    raise ValueError(f"unknown haystack {haystack!r}, expected one of {text.HAYSTACKS}")


def _take_tokens(sentences: Iterator[str], budget: int) -> list[str]:
    """The longest beginning of ``sentences`` that fits into ``budget`` tokens."""
    taken = []
    for sentence in sentences:
        budget -= text.count_tokens(sentence)
        if budget < 0:
            break
        taken.append(sentence)
    return taken


def _scatter(rng: random.Random, statements: Sequence[str], filler: Sequence[str]) -> list[str]:
    """Insert the statements between filler sentences at random places, in their order."""
    gaps = sorted(rng.choices(range(len(filler) + 1), k=len(statements)))
    sentences: list[str] = []
    start = 0
    for gap, statement in zip(gaps, statements, strict=True):
        sentences += [*filler[start:gap], statement]
        start = gap
    return [*sentences, *filler[start:]]


def _insert(statements: Sequence[str], filler: Sequence[str], depth: float) -> list[str]:
    """Insert the statements together behind the share ``depth`` of the filler sentences."""
    gap = round(depth * len(filler))
    return [*filler[:gap], *statements, *filler[gap:]]


def _interleave(rng: random.Random, sequences: Sequence[Sequence[str]]) -> list[str]:
    """Merge sequences in random order, each keeping its own."""
    turns = [index for index, sequence in enumerate(sequences) for _ in sequence]
    rng.shuffle(turns)
    iterators = [iter(sequence) for sequence in sequences]
    return [next(iterators[index]) for index in turns]


def _chain_statements(chain: Sequence[str], value: str) -> list[str]:
    """The statements of one chain of variables, in order."""
    links = [text.alias(variable, source) for source, variable in itertools.pairwise(chain)]
    return [text.assignment(chain[0], value), *links]


def _without(keys: Sequence[str], used: Iterable[str]) -> list[str]:
    """``keys`` less the used ones, in order."""
    taken = set(used)
    return [key for key in keys if key not in taken]
