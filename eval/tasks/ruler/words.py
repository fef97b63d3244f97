"""Random keys, values and words, drawn from a `random.Random`."""

import random
import string
import uuid
from collections.abc import Callable, Collection, Iterator
from functools import cache

from wonderwords import Defaults, RandomWord, filter_profanity


@cache
def _word_list(category: Defaults) -> tuple[str, ...]:
    """One of the lists of `wonderwords`, sorted, of single words without profanities."""
    listed = RandomWord(words=category).filter(include_categories=["words"], exclude_with_spaces=True)
    return tuple(sorted(set(filter_profanity(listed))))


def adjectives() -> tuple[str, ...]:
    """All adjectives, sorted."""
    return _word_list(Defaults.ADJECTIVES)


def nouns() -> tuple[str, ...]:
    """All nouns, sorted."""
    return _word_list(Defaults.NOUNS)


@cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs, sorted and without repeats."""
    return tuple(sorted({*nouns(), *adjectives(), *_word_list(Defaults.VERBS)}))


def random_compound(rng: random.Random) -> str:
    """An adjective and a noun, such as `quiet-harbor`."""
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def random_number(rng: random.Random) -> str:
    """Seven digits, the first of which is not 0."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def random_letters(rng: random.Random, count: int, letters: str = string.ascii_lowercase) -> str:
    """`count` letters in a row."""
    return "".join(rng.choices(letters, k=count))


def distinct(draw: Callable[[random.Random], str], rng: random.Random, taken: Collection[str] = ()) -> Iterator[str]:
    """What `draw` gives, endlessly, without repeats and without what is `taken`."""
    seen = set(taken)
    while True:
        drawn = draw(rng)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def list_words(rng: random.Random) -> Iterator[str]:
    """The whole vocabulary in random order, then compounds: endless and without repeats."""
    words = vocabulary()
    yield from (words[index] for index in shuffled(rng, len(words)))
    yield from distinct(random_compound, rng, words)


def shuffled(rng: random.Random, count: int) -> Iterator[int]:
    """The numbers below `count` in random order, drawn only as far as they are read (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        picked = rng.randint(0, last)
        yield moved.get(picked, picked)
        moved[picked] = moved.pop(last, last)
