"""Needle in a haystack: one number hidden at every depth of texts of every length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pikv_hf.eval.errors import user_input
from pikv_hf.eval.reference.synthetic import Sample, make_sample
from pikv_hf.eval.tasks.reference import MAX_NEW_TOKENS as REFERENCE_LIMIT
from pikv_hf.eval.tasks.ruler.counting import Prompt, TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import fit
from pikv_hf.eval.tasks.ruler.haystack import Haystack
from pikv_hf.eval.tasks.ruler.needles import NEEDLE_TASKS, needle_problem
from pikv_hf.eval.tasks.ruler.templates import MAX_NEW_TOKENS
from pikv_hf.eval.tasks.sample import EvalSample


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of the heat map.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of a sample.
    depths : tuple of float
        Share of the text before the needle, in [0, 1].
    samples : int
        Per cell.
    seed : int
        Of needles and haystacks.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def cells(self) -> Iterator[tuple[int, float, int]]:
        """Yield length, depth and index of every sample."""
        for length in self.lengths:
            for depth in self.depths:
                for index in range(self.samples):
                    yield length, depth, index


def samples(grid: Grid, tokenizer: Any, haystack: Haystack | None = None) -> list[EvalSample]:
    """Return the grid's samples: RULER's `niah_single_2` with the needle at a chosen depth of the haystack.

    Lengths are counted as in :func:`pikv_hf.eval.tasks.ruler.generate`; `ruler.score` scores them.

    Raises
    ------
    ValueError
        If a length is too small for needle, question and answer.
    """
    counter, text = TokenCounter(tokenizer), haystack or Haystack.bundled()
    return [_sample(grid.seed, counter, text, *cell) for cell in grid.cells()]


def reference_samples(grid: Grid) -> list[EvalSample]:
    """Return the grid's samples in the words of the bundled model; `reference.score` scores them."""
    return [_reference_sample(grid.seed, *cell) for cell in grid.cells()]


def _sample(seed: int, counter: TokenCounter, text: Haystack, length: int, depth: float, index: int) -> EvalSample:
    rng = _random(seed, length, depth, index)
    problem = needle_problem(NEEDLE_TASKS["niah_single_2"], rng, counter, text, length, depth)
    limit = MAX_NEW_TOKENS["niah"]
    [fitted] = fit([problem], counter, length, limit)
    return _cell(fitted.prompt, fitted.answers, limit, length, depth, index)


def _reference_sample(seed: int, length: int, depth: float, index: int) -> EvalSample:
    rng = _random(seed, length, depth, index)
    with user_input(f"a needle does not fit into {length} tokens"):
        sample = make_sample("single", length, rng, depth=depth)
    return _cell(sample, sample.answers, REFERENCE_LIMIT, length, depth, index, exact=sample.answer)


def _random(seed: int, length: int, depth: float, index: int) -> random.Random:
    return random.Random(f"needle {seed} {length} {depth} {index}")


def _cell(
    parts: Prompt | Sample, answers: tuple[str, ...], limit: int, length: int, depth: float, index: int, **extra: Any
) -> EvalSample:
    return EvalSample(
        id=f"needle-{length}-{depth:.3f}-{index:03d}",
        task=f"needle_{length}",
        context=parts.context,
        question=parts.question,
        answer_prefix=parts.answer_prefix,
        answers=answers,
        max_new_tokens=limit,
        length=length,
        extra={"depth": depth, **extra},
    )
