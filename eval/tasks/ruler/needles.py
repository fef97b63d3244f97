"""Needle-in-a-haystack: the eight `niah` tasks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

from pikv_hf.eval.tasks.ruler import templates
from pikv_hf.eval.tasks.ruler.counting import TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem
from pikv_hf.eval.tasks.ruler.haystack import Haystack
from pikv_hf.eval.tasks.ruler.scattered import Places, noise_lines, random_places, scatter
from pikv_hf.eval.tasks.ruler.words import distinct, random_compound, random_number, random_uuid

# RULER's 40 depths in per cent of the haystack's sentences.
_DEPTHS = [round(index * 100 / 39) for index in range(40)]

_DRAWS: dict[str, Callable[[Random], str]] = {"word": random_compound, "number": random_number, "uuid": random_uuid}


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """What one task hides and asks for.

    Attributes
    ----------
    haystack : str
        `"noise"` for five repeated sentences, `"essay"` for running text, `"needle"` for other needles.
    key, value : str
        Kinds of keys and values; a `"word"` is an adjective and a noun.
    keys, values, queries : int
        Keys hidden, values of each of them, keys asked for.
    """

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def asks_one(self) -> bool:
        """Whether the answer is a single value."""
        return self.queries * self.values == 1


#: Parameters of the official configuration (`scripts/synthetic.yaml`). Four queries need four keys.
NEEDLE_TASKS = {
    "niah_single_1": NeedleTask(haystack="noise"),
    "niah_single_2": NeedleTask(),
    "niah_single_3": NeedleTask(value="uuid"),
    "niah_multikey_1": NeedleTask(keys=4),
    "niah_multikey_2": NeedleTask(haystack="needle"),
    "niah_multikey_3": NeedleTask(haystack="needle", key="uuid", value="uuid"),
    "niah_multivalue": NeedleTask(values=4),
    "niah_multiquery": NeedleTask(keys=4, queries=4),
}


def needle_problem(
    task: NeedleTask,
    rng: Random,
    counter: TokenCounter,
    haystack: Haystack,
    budget: int,
    depth: float | None = None,
) -> Problem:
    """Hide the needles of one sample in a haystack of up to `budget` tokens, at random or all at one `depth` in [0, 1].

    All keys of a sample differ, and so do all values. A haystack of needles, each 20 to 90 tokens long, is topped up
    with noise sentences where whole needles leave more than 2% of the length.
    """
    keys, values = distinct(_DRAWS[task.key], rng), distinct(_DRAWS[task.value], rng)
    hidden = {key: list(islice(values, task.values)) for key in islice(keys, task.keys)}
    pairs = [(key, value) for key, owned in hidden.items() for value in owned]
    rng.shuffle(pairs)
    asked = rng.sample(list(hidden), task.queries)
    answers = [value for key in asked for value in hidden[key]]
    places = _places(task, rng, len(pairs), depth)
    order = [value for _, value in pairs]
    draft = scatter(
        counter,
        templates.needle_lead(task.value, one=task.asks_one),
        [templates.needle(key, value, task.value) for key, value in pairs],
        _units(task, rng, haystack, keys, values),
        budget,
        joiner=" " if task.haystack == "essay" else "\n",
        places=places,
        asked=[order.index(value) for value in answers],
    )
    question, prefix = templates.needle_question(asked, task.value, one=task.asks_one)
    return Problem(draft, question, prefix, tuple(answers))


def _units(
    task: NeedleTask, rng: Random, haystack: Haystack, keys: Iterator[str], values: Iterator[str]
) -> Iterator[str]:
    """Units of the task's haystack; needles in it go on with the keys and values that are not taken."""
    if task.haystack == "noise":
        return noise_lines()
    if task.haystack == "essay":
        return haystack.from_random(rng)
    return (templates.needle(key, value, task.value) for key, value in zip(keys, values, strict=True))


def _places(task: NeedleTask, rng: Random, count: int, depth: float | None) -> Places:
    """Where needles go: at one depth, at `count` different ones of RULER's 40, or between any two lines."""
    if depth is not None:
        return lambda units: [round(depth * units)] * count
    if task.haystack != "essay":
        return random_places(rng, count)
    depths: Sequence[int] = sorted(rng.sample(_DEPTHS, count))
    return lambda units: [units * depth // 100 for depth in depths]
