"""Sentences of the synthetic documents: haystack filler, RULER's statements, questions and answer prefixes.

The short template sentences follow RULER (Hsieh et al., 2024, arXiv 2404.06654, task templates for needle-in-a-haystack
and variable tracking), because that wording is what the evaluation suites ask with. Variable tracking keeps RULER's
statements and asks them in the other direction: the variable is named and its chain of assignments is the answer.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence

from pikv_hf.eval.reference.synthetic.words import FILLERS

#: What one token is: a newline, a word, a digit, a special token or a punctuation mark. Spaces are not tokens.
TOKEN_PATTERN = r"\n|[A-Za-z]+|\d|<[a-z]+>|[^\sA-Za-z\d]"

#: Kinds of haystack: RULER's repeated noise sentences, sentences of random filler words, or only other needles.
HAYSTACKS = ("noise", "essay", "needles")

NOISE_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

PREAMBLE_ONE = (
    "A special magic number is hidden within the following text. "
    "Make sure to memorize it. I will quiz you about the number afterwards."
)
PREAMBLE_MANY = (
    "Some special magic numbers are hidden within the following text. "
    "Make sure to memorize it. I will quiz you about the numbers afterwards."
)
PREAMBLE_VARIABLES = "Memorize and track the chain(s) of variable assignment hidden in the following text."

_TOKEN = re.compile(TOKEN_PATTERN)


def split_tokens(text: str) -> list[str]:
    """Split ``text`` the way the reference tokenizer does."""
    return _TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """Tokens of ``text`` under the reference tokenizer, without building one."""
    return len(split_tokens(text))


def needle(key: str, value: str) -> str:
    """The sentence that hides ``value`` under ``key``."""
    return f"One of the special magic numbers for {key} is: {value}."


def assignment(variable: str, value: str) -> str:
    """The statement that starts a chain of variables."""
    return f"VAR {variable} = {value}."


def alias(variable: str, source: str) -> str:
    """The statement that hands the value of ``source`` on to ``variable``."""
    return f"VAR {variable} = VAR {source}."


def enumerate_words(words: Sequence[str]) -> str:
    """``a, b, and c``: how RULER lists the keys of a multi-query question."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def ask_one(key: str) -> tuple[str, str]:
    """Question and answer prefix for the only number of ``key``."""
    return (
        f"What is the special magic number for {key} mentioned in the provided text?",
        f"The special magic number for {key} mentioned in the provided text is",
    )


def ask_all(keys: Sequence[str]) -> tuple[str, str]:
    """Question and answer prefix for all numbers of one key, or for the numbers of several keys."""
    listed = enumerate_words(keys)
    return (
        f"What are all the special magic numbers for {listed} mentioned in the provided text?",
        f"The special magic numbers for {listed} mentioned in the provided text are",
    )


def ask_variable(variable: str) -> tuple[str, str]:
    """Question and answer prefix for the value of ``variable`` and the chain it came through."""
    return f"What is the value of the variable {variable} in the text above?", f"VAR {variable} ="


def random_values(rng: random.Random, count: int) -> list[str]:
    """``count`` distinct numbers of four digits."""
    return [str(value) for value in rng.sample(range(1000, 10_000), count)]


def noise_sentences() -> Iterator[str]:
    """RULER's noise sentences, over and over."""
    return itertools.cycle(NOISE_SENTENCES)


def essay_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of 4 to 12 random filler words."""
    while True:
        yield " ".join(rng.choices(FILLERS, k=rng.randint(4, 12))) + "."


def needle_sentences(rng: random.Random, keys: Sequence[str], taken: set[str]) -> Iterator[str]:
    """Needles that nobody asks for: one for each of ``keys`` in random order, values outside ``taken``."""
    values = (value for value in random_values(rng, len(keys) + len(taken)) if value not in taken)
    for key, value in zip(rng.sample(list(keys), len(keys)), values, strict=False):
        yield needle(key, value)


def assignment_sentences(rng: random.Random, variables: Sequence[str], taken: set[str]) -> Iterator[str]:
    """Chains of variables that nobody asks for, each of one to five of ``variables``."""
    names = rng.sample(list(variables), len(variables))
    values = (value for value in random_values(rng, len(names) + len(taken)) if value not in taken)
    while names:
        chain = [names.pop() for _ in range(min(len(names), rng.randint(1, 5)))]
        yield assignment(chain[0], next(values))
        for source, variable in itertools.pairwise(chain):
            yield alias(variable, source)
