"""Needle in a haystack: one number hidden at every depth of texts of every length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pikv_hf.eval.errors import user_input
from pikv_hf.eval.synthetic import make_sample
from pikv_hf.eval.tasks.reference import MAX_NEW_TOKENS
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


def reference_samples(grid: Grid) -> list[EvalSample]:
    """Return the grid's samples in the words of the bundled model; `reference.score` scores them."""
    return [_reference_sample(grid.seed, *cell) for cell in grid.cells()]


def _reference_sample(seed: int, length: int, depth: float, index: int) -> EvalSample:
    rng = random.Random(f"needle {seed} {length} {depth} {index}")
    with user_input(f"a needle does not fit into {length} tokens"):
        sample = make_sample("single", length, rng, depth=depth)
    return EvalSample(
        id=f"needle-{length}-{depth:.3f}-{index:03d}",
        task=f"needle_{length}",
        context=sample.context,
        question=sample.question,
        answer_prefix=sample.answer_prefix,
        answers=sample.answers,
        max_new_tokens=MAX_NEW_TOKENS,
        length=length,
        extra={"exact": sample.answer, "depth": depth},
    )
