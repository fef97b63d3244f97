"""Fill samples up to the length asked for, and never beyond.

A draft can say how long it would be at any size without being written out, by adding up the cost of its pieces. That is
nearly right, so each sample is written and encoded once; the few that miss are corrected by the ratio just seen.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pikv_hf.eval.tasks.ruler.counting import Prompt, TokenCounter

#: Least share of the requested length that a sample fills.
FILLED = 0.98
# Rounds spent on a sample that fits but could be longer; a sample that is too long is shortened until it fits.
_ROUNDS = 8


class Draft(Protocol):
    """A context that can be written at several sizes, counted in whole units such as sentences or documents."""

    @property
    def least(self) -> int:
        """Smallest size at which the task is still itself."""

    @property
    def largest(self) -> int:
        """Largest size for which there are units."""

    def cost(self, size: int) -> int:
        """Estimated tokens of the context; never falls as `size` grows."""

    def tail(self, size: int, room: int) -> tuple[str, int]:
        """Something finer than a unit to follow `size` of them, of at most `room` tokens, and its tokens."""

    def context(self, size: int, tail: str) -> str:
        """The context itself; the same arguments give the same text."""

    def extra(self, size: int) -> Mapping[str, Any]:
        """Facts about the context for plots."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A context to be sized, with its question."""

    draft: Draft
    question: str
    answer_prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A problem at its final size; `tokens` is its length, room for the answer included."""

    prompt: Prompt
    answers: tuple[str, ...]
    tokens: int
    extra: Mapping[str, Any]


class TooShortError(ValueError):
    """The length asked for cannot hold the task; `missing` tokens more would."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} tokens are missing")
        self.missing = missing


@dataclass(slots=True)
class _Fit:
    """State of one sample between rounds.

    `room` and `floor` are the most and the least tokens that the context may have; `scale` is how many tokens an
    estimated one turned out to be; `fill` says that whole units alone were not enough.
    """

    problem: Problem
    room: int
    floor: int
    scale: float = 1.0
    size: int = -1
    tail: str = ""
    estimate: int = 0
    fill: bool = False
    best: Fitted | None = None
    settled: bool = False

    def choose(self) -> None:
        """Pick the largest whole size whose estimate fits; add a tail where that falls short."""
        draft, before, budget = self.problem.draft, (self.size, self.tail), int(self.room / self.scale)
        sizes = range(draft.least, draft.largest + 1)
        self.size = sizes[max(0, bisect_right(sizes, budget, key=draft.cost) - 1)]
        self.tail, self.estimate = "", draft.cost(self.size)
        self.fill = self.fill or self.estimate * self.scale < self.floor
        if self.fill:
            self.tail, cost = draft.tail(self.size, budget - self.estimate)
            self.estimate += cost
        self.settled = (self.size, self.tail) == before

    def prompt(self) -> Prompt:
        """The problem as it is chosen now."""
        problem = self.problem
        return Prompt(problem.draft.context(self.size, self.tail), problem.question, problem.answer_prefix)

    def is_least(self) -> bool:
        """Whether nothing can be taken away any more."""
        return self.size == self.problem.draft.least and not self.tail

    def learn(self, prompt: Prompt, tokens: int) -> None:
        """Take in how many tokens the context of the chosen prompt really has."""
        if tokens <= self.room and (self.best is None or tokens > self.best.tokens):
            self.best = Fitted(prompt, self.problem.answers, tokens, self.problem.draft.extra(self.size))
        self.settled = self.settled or self.floor <= tokens <= self.room
        scale = tokens / max(1, self.estimate)
        # A sample that is too long gets shorter each time, so that it fits in the end or is known not to.
        self.scale = max(self.scale, scale) if tokens > self.room else scale


def fit(problems: Sequence[Problem], counter: TokenCounter, length: int, max_new_tokens: int) -> list[Fitted]:
    """Write each problem as long as `length` allows.

    Parameters
    ----------
    problems : sequence of Problem
        Drafts with their questions.
    counter : TokenCounter
        Of the tokenizer that the length is counted in.
    length : int
        Tokens of context, question, answer prefix and answer together.
    max_new_tokens : int
        Tokens kept free for the answer.

    Returns
    -------
    list of Fitted
        In order; each at most `length` tokens long and, unless a unit is coarser than that, at least 98% of it.

    Raises
    ------
    TooShortError
        If a problem does not fit at its least size.
    """
    asked = counter.question_lengths([Prompt("", p.question, p.answer_prefix) for p in problems])
    taken = [tokens + max_new_tokens for tokens in asked]
    least = math.ceil(FILLED * length)
    fits = [_Fit(problem, length - t, least - t) for problem, t in zip(problems, taken, strict=True)]
    rounds = 0
    while unfinished := [f for f in fits if f.best is None or (not f.settled and rounds < _ROUNDS)]:
        _round(unfinished, counter)
        rounds += 1
    return [replace(f.best, tokens=f.best.tokens + t) for f, t in zip(fits, taken, strict=True) if f.best is not None]


def _round(fits: Sequence[_Fit], counter: TokenCounter) -> None:
    """Choose a size for each sample, write it, and encode all of them at once."""
    for fitted in fits:
        fitted.choose()
    prompts = [fitted.prompt() for fitted in fits]
    lengths = counter.context_lengths(prompts)
    hopeless = [tokens - f.room for f, tokens in zip(fits, lengths, strict=True) if f.is_least()]
    if (missing := max(hopeless, default=0)) > 0:
        raise TooShortError(missing)
    for fitted, prompt, tokens in zip(fits, prompts, lengths, strict=True):
        fitted.learn(prompt, tokens)
