"""Common words extraction (`cwe`): a numbered list in which ten words stand out, after a worked example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from random import Random
from typing import Any

from pikv_hf.eval.tasks.ruler import templates
from pikv_hf.eval.tasks.ruler.counting import Pieces, TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem
from pikv_hf.eval.tasks.ruler.words import list_words

COMMON_WORDS = 10
_SHORT = 4096


@dataclass(frozen=True, slots=True)
class Frequencies:
    """How often common and uncommon words are listed, in the sample and in its example.

    Attributes
    ----------
    common, uncommon : int
        Times that each word of the sample is listed.
    example_common, example_uncommon, example_words : int
        The same in the example, and how many uncommon words that has.
    """

    common: int
    uncommon: int
    example_common: int
    example_uncommon: int
    example_words: int


#: RULER's two settings: shorter than 4,096 tokens, and from there on.
SHORT = Frequencies(6, 1, 3, 1, 10)
LONG = Frequencies(30, 3, 10, 3, 30)


@dataclass(frozen=True, slots=True)
class WordList:
    """A numbered list of ten common words and `size` uncommon ones, in random order.

    Attributes
    ----------
    lead : str
        Everything before the list.
    common : tuple of str
        The answers.
    uncommon : Pieces
        Further words, with the running cost of listing each once.
    frequencies : Frequencies
        How often the words are listed.
    seed : int
        Of the order.
    base : int
        Tokens of the lead and the common words.
    numbers : tuple of int
        Running cost of the numbers, from none on.
    """

    lead: str
    common: tuple[str, ...]
    uncommon: Pieces
    frequencies: Frequencies
    seed: int
    base: int
    numbers: tuple[int, ...]

    @property
    def least(self) -> int:
        """One uncommon word, so that the common ones stand out."""
        return 1

    @property
    def largest(self) -> int:
        """All words that were drawn."""
        return len(self.uncommon)

    def cost(self, size: int) -> int:
        """Estimated tokens with `size` uncommon words."""
        listed = self.frequencies.common * len(self.common) + self.frequencies.uncommon * size
        return self.base + self.numbers[listed] + self.frequencies.uncommon * self.uncommon.reach[size]

    def tail(self, size: int, room: int) -> tuple[str, int]:
        """Nothing: one more word is less than 2% of any length."""
        return "", 0

    def context(self, size: int, tail: str) -> str:
        """Lead and list, ending with a newline."""
        repeats = self.frequencies
        listing = [*self.common * repeats.common, *self.uncommon.texts[:size] * repeats.uncommon]
        Random(self.seed).shuffle(listing)
        return f"{self.lead}{_numbered(listing)}\n"

    def extra(self, size: int) -> Mapping[str, Any]:
        """How many uncommon words there are."""
        return {"uncommon_words": size}


def common_words_problem(rng: Random, counter: TokenCounter, length: int) -> Problem:
    """A list of up to `length` tokens; the setting follows from the length."""
    frequencies = SHORT if length < _SHORT else LONG
    lead = f"{_example(rng, frequencies)}\n{templates.CWE_LEAD}"
    words = list_words(rng)
    common = tuple(islice(words, COMMON_WORDS))
    # A listed word has a number, a full stop and itself, so this is more than enough.
    uncommon = counter.gather(words, length // (2 * frequencies.uncommon))
    base = counter.cost(lead, "") + frequencies.common * sum(counter.costs(common))
    listed = frequencies.common * len(common) + frequencies.uncommon * len(uncommon)
    numbers = accumulate(counter.costs([f"{number + 1}." for number in range(listed)]), initial=0)
    draft = WordList(lead, common, uncommon, frequencies, rng.getrandbits(64), base, tuple(numbers))
    return Problem(draft, templates.CWE_QUESTION, templates.CWE_PREFIX, common)


def _example(rng: Random, frequencies: Frequencies) -> str:
    """A short list with its question and answer."""
    words = list(islice(list_words(rng), COMMON_WORDS + frequencies.example_words))
    common, uncommon = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listing = common * frequencies.example_common + uncommon * frequencies.example_uncommon
    rng.shuffle(listing)
    asked = f"{templates.CWE_QUESTION} {templates.CWE_PREFIX}"
    return f"{templates.CWE_LEAD}{_numbered(listing)}\n{asked} {_numbered(common)}"


def _numbered(words: Sequence[str]) -> str:
    """`1. first 2. second` and so on."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
