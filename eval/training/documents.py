"""Training documents: the retrieval tasks in random shapes, and the primers that start associative recall.

A document is a list of :class:`Segment`: text with the role that decides its loss weight.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pikv_hf.eval.reference.synthetic import tasks, text
from pikv_hf.eval.reference.synthetic.tasks import Document
from pikv_hf.eval.reference.synthetic.words import FILLERS

Role = Literal["context", "prefix", "answer"]

# Rounds of questions share a training document with its haystack; more of them give more signal per token, but the
# needles would come ever closer to their questions.
_QUESTION_SHARE = 0.4
_MAX_ROUNDS = 16
_MAX_QUERY_NEEDLES = 24
_MAX_GROUPS = 4
_MAX_DISTRACTORS = 8
_MAX_CHAINS = 5

# Tokens of one round of each kind of question, of a needle, and of the longest preamble with <bos> and newlines.
_PAIR_ROUND = tasks.single_question("key", "1000").tokens
_QUERY_ROUND = tasks.keys_question([("key", "1000")] * tasks.KEYS_PER_QUERY).tokens
_VALUES_ROUND = tasks.values_question("key", ["1000"] * tasks.VALUES_PER_KEY).tokens
_CHAIN_ROUND = tasks.variable_question(["key"] * 5, "1000").tokens
_NEEDLE = text.count_tokens(text.needle("key", "1000"))
_CHAIN = text.count_tokens(text.assignment("key", "1000")) + 4 * text.count_tokens(text.alias("key", "key"))
_OVERHEAD = text.count_tokens(text.PREAMBLE_MANY) + 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a document: ``context`` carries no loss, ``prefix`` little, ``answer`` the full weight."""

    text: str
    role: Role


def _as_segments(document: Document) -> list[Segment]:
    """Context, then rounds of question, answer prefix and answer."""
    segments = [Segment(f"<bos>{document.context}", "context")]
    for question in document.questions:
        segments += [
            Segment(f"{question.text}\n", "context"),
            Segment(question.answer_prefix, "prefix"),
            Segment(question.ending, "answer"),
        ]
    return segments


def repetition(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Random words repeated word by word: the first pattern that attention learns to copy."""
    words = [*keys, *FILLERS[: len(keys)], *text.random_values(rng, 8)]
    sequence = rng.choices(words, k=rng.randint(6, max(6, length // 3)))
    first, *others = sequence
    copies = [*others, *sequence * (length // len(sequence))]
    # The first word of the first copy cannot be known, so it belongs to the context.
    return [Segment(f"<bos>{' '.join(sequence)} {first}", "context"), Segment(" ".join(copies), "answer")]


def association(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Word pairs ``apple calm.``, then the keys again. Values come from the fillers: drawn from keys they confuse."""
    names = rng.sample(list(keys), rng.randint(2, min(len(keys), length // 6)))
    values = rng.choices(FILLERS[: len(keys)], k=len(names))
    pairs = list(zip(names, values, strict=True))
    segments = [Segment("<bos>" + " ".join(f"{key} {value}." for key, value in pairs), "context")]
    for key, value in rng.choices(pairs, k=length // 3 - len(pairs)):
        segments += [Segment(key, "context"), Segment(f"{value}.", "answer")]
    return segments


def recall(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """``apple: 1234.`` for several keys, then the keys again: the needle task without its wording."""
    pairs = tasks.random_pairs(rng, keys, rng.randint(2, min(len(keys), length // 14)))
    segments = [Segment("<bos>" + " ".join(f"{key}: {value}." for key, value in pairs), "context")]
    for key, value in rng.choices(pairs, k=(length - 7 * len(pairs)) // 8):
        segments += [Segment(f"{key}:", "context"), Segment(f"{value}.<eos>", "answer")]
    return segments


def variable_recall(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Chains of variables without a question: ``VAR b =`` continues with the rest of its chain."""
    hops = [rng.randint(0, 2) for _ in range(rng.randint(1, max(1, length // 48)))]
    plan = tasks.plan_variables(rng, keys, hops=hops, rounds=_MAX_ROUNDS)
    segments = [Segment("<bos>" + " ".join(plan.statements), "context")]
    for question in rng.choices(plan.questions, k=_MAX_ROUNDS):
        segments += [Segment(question.answer_prefix, "context"), Segment(question.ending, "answer")]
    return segments


def single(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """One needle in noise or essay."""
    plan = tasks.plan_pairs(rng, keys)
    return _as_segments(tasks.hide(plan, length, rng, rng.choice(("noise", "essay", "essay"))))


def multikey(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Several keys with a number each, asked for one by one, in any haystack."""
    rounds = _rounds(rng, length, _PAIR_ROUND)
    most = min(len(keys), _room(length, rounds * _PAIR_ROUND) // _NEEDLE)
    needles = rng.randint(min(rounds, most), most)
    plan = tasks.plan_pairs(rng, keys, needles=needles, rounds=min(rounds, needles))
    return _as_segments(tasks.hide(plan, length, rng, rng.choice(text.HAYSTACKS)))


def multiquery(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Several keys with a number each, asked for in fours."""
    rounds = _rounds(rng, length, _QUERY_ROUND)
    most = min(_MAX_QUERY_NEEDLES, _room(length, rounds * _QUERY_ROUND) // _NEEDLE)
    plan = tasks.plan_queries(rng, keys, needles=rng.randint(tasks.KEYS_PER_QUERY, most), rounds=rounds)
    return _as_segments(tasks.hide(plan, length, rng, rng.choice(text.HAYSTACKS)))


def multivalue(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Keys with four numbers each, all asked for, among keys with one."""
    group = _VALUES_ROUND + tasks.VALUES_PER_KEY * _NEEDLE
    groups = rng.randint(1, min(_MAX_GROUPS, _room(length, 0) // group))
    most = min(_MAX_DISTRACTORS, _room(length, groups * group) // _NEEDLE)
    plan = tasks.plan_values(rng, keys, groups=groups, distractors=rng.randint(0, most))
    return _as_segments(tasks.hide(plan, length, rng, rng.choice(("noise", "essay", "essay", "needles"))))


def variables(rng: random.Random, length: int, keys: Sequence[str]) -> list[Segment]:
    """Chains of variables of up to four hops, asked for at any place."""
    rounds = _rounds(rng, length, _CHAIN_ROUND)
    chains = rng.randint(1, min(_MAX_CHAINS, _room(length, rounds * _CHAIN_ROUND) // _CHAIN))
    # Long chains are the hard ones, and their variables also give questions of few hops.
    hops = [rng.choice((1, 2, 3, 4, 4)) for _ in range(chains)]
    plan = tasks.plan_variables(rng, keys, hops=hops, rounds=rounds)
    return _as_segments(tasks.hide(plan, length, rng, rng.choice(text.HAYSTACKS)))


def _rounds(rng: random.Random, length: int, round_tokens: int) -> int:
    """How many questions to ask: one as in an evaluation, or as many as leave the haystack its share."""
    most = max(1, min(_MAX_ROUNDS, int(_QUESTION_SHARE * length) // round_tokens))
    return 1 if rng.random() < 0.2 else rng.randint((most + 1) // 2, most)


def _room(length: int, taken: int) -> int:
    """Tokens left for statements beside the preamble and what is taken."""
    return length - _OVERHEAD - taken


#: Name -> ``(rng, length in tokens, pool of keys) -> segments`` of about that length.
TRAINING_TASKS: dict[str, Callable[[random.Random, int, Sequence[str]], list[Segment]]] = {
    "repetition": repetition,
    "association": association,
    "recall": recall,
    "variable_recall": variable_recall,
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "vt": variables,
}
