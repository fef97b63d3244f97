"""Frequent words extraction (`fwe`): coded words whose frequencies follow a zeta distribution."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import zeta

from pikv_hf.eval.tasks.ruler import templates
from pikv_hf.eval.tasks.ruler.counting import TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem
from pikv_hf.eval.tasks.ruler.words import distinct, random_letters

ALPHA = 2.0
_LETTERS = 6
# The most frequent "word", which the question says to ignore.
_DOTS = "..."
# From here on the third answer is always more frequent than the word after it: 74 (1/16 - 1/25) / zeta(2) > 1.
_LEAST_WORDS = 74
_TOKENS_PER_WORD = 50


@dataclass(frozen=True, slots=True)
class CodedText:
    """Coded words in random order; the word of rank `k` appears `size * k**-ALPHA / zeta(ALPHA)` times.

    Attributes
    ----------
    words : tuple of str
        By rank; the first is the dots.
    shares : ndarray
        Share of each word, (words,); the tail of the distribution is cut, so they add up to less than 1.
    costs : ndarray
        Tokens of each word, (words,).
    seed : int
        Of the order.
    base : int
        Tokens of the lead.
    largest : int
        Most words that can be asked for.
    """

    words: tuple[str, ...]
    shares: NDArray[np.float64]
    costs: NDArray[np.int64]
    seed: int
    base: int
    largest: int

    @property
    def least(self) -> int:
        """Words that make the answer unambiguous."""
        return _LEAST_WORDS

    def counts(self, size: int) -> NDArray[np.int64]:
        """How often each word appears, (words,)."""
        return (size * self.shares).astype(np.int64)

    def cost(self, size: int) -> int:
        """Estimated tokens of a text of `size` words."""
        return self.base + int(self.counts(size) @ self.costs)

    def tail(self, size: int, room: int) -> tuple[str, int]:
        """Nothing: one more word is less than 2% of any length."""
        return "", 0

    def context(self, size: int, tail: str) -> str:
        """Lead and coded text, ending with a newline."""
        coded = [word for word, count in zip(self.words, self.counts(size), strict=True) for _ in range(count)]
        Random(self.seed).shuffle(coded)
        return f"{templates.FWE_LEAD}{' '.join(coded)}\n"

    def extra(self, size: int) -> Mapping[str, Any]:
        """How often the dots and the answers appear."""
        return {"counts": self.counts(size)[:4].tolist()}


def coded_words_problem(rng: Random, counter: TokenCounter, length: int) -> Problem:
    """A coded text of up to `length` tokens from a vocabulary of one word per 50 tokens of it."""
    vocabulary = max(length // _TOKENS_PER_WORD, 5)
    coded = distinct(lambda source: random_letters(source, _LETTERS), rng)
    words = (_DOTS, *islice(coded, vocabulary - 1))
    draft = CodedText(
        words,
        np.arange(1, vocabulary + 1, dtype=np.float64) ** -ALPHA / zeta(ALPHA),
        np.array(counter.costs(words), dtype=np.int64),
        rng.getrandbits(64),
        counter.cost(templates.FWE_LEAD.rstrip(), ""),
        # Even where each word were half a token.
        max(2 * length, _LEAST_WORDS),
    )
    return Problem(draft, templates.FWE_QUESTION, templates.FWE_PREFIX, words[1:4])
