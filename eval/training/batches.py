"""Make batches: documents as token ids with a loss weight and a position for every token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pikv_hf.eval.reference.tokenizer import DIGITS, PUNCTUATION
from pikv_hf.eval.training.documents import TRAINING_TASKS, Segment

PREFIX_WEIGHT = 0.1
LOOKUP_WEIGHT = 2.0  # first digit of a number, words: what must be found in the context
DIGIT_WEIGHT = 1.5  # further digits: copying goes on
FORM_WEIGHT = 0.5  # punctuation and <eos>


@dataclass(frozen=True, slots=True)
class Batch:
    """Training documents, right-padded.

    Attributes
    ----------
    ids : Tensor
        ``[B, T]`` int64 token ids.
    weights : Tensor
        ``[B, T]`` float32 loss weight of predicting that token from those before it; 0 for context and padding.
    positions : Tensor
        ``[B, T]`` int64 position ids, increasing, with skips where PoSE is on.
    tasks : Tensor
        ``[B]`` int64 indices into ``TRAINING_TASKS``.
    """

    ids: Tensor
    weights: Tensor
    positions: Tensor
    tasks: Tensor


class BatchBuilder:
    """Draws documents and encodes them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The reference tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encoder = tokenizer.backend_tokenizer
        self._pad = tokenizer.pad_token_id
        self._full_stop = tokenizer.convert_tokens_to_ids(".")
        self._digits = frozenset(tokenizer.convert_tokens_to_ids(list(DIGITS)))
        self._form = frozenset([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(PUNCTUATION))])

    def build(
        self,
        rng: random.Random,
        length: int,
        rows: int,
        mix: dict[str, float],
        keys: Sequence[str],
        span: int | None = None,
    ) -> Batch:
        """Draw ``rows`` documents of at most ``length`` tokens.

        Parameters
        ----------
        rng : random.Random
            Source of all randomness.
        length, rows : int
            Tokens per row and rows.
        mix : dict[str, float]
            Task name to its share of the rows (in expectation).
        keys : sequence of str
            Keys in use.
        span : int, optional
            With PoSE, the last position id; ``None`` for consecutive positions.
        """
        names = rng.choices(list(mix), weights=list(mix.values()), k=rows)
        ids = torch.full((rows, length), self._pad)
        weights = torch.zeros(rows, length)
        positions = torch.arange(length).repeat(rows, 1)
        for row, name in enumerate(names):
            row_ids, row_weights = self.encode(TRAINING_TASKS[name](rng, length, keys))
            count = min(len(row_ids), length)
            ids[row, :count] = torch.tensor(row_ids[:count])
            weights[row, :count] = torch.tensor(row_weights[:count])
            if span is not None:
                positions[row] += self._skips(rng, row_ids[:count], length, span)
        order = list(TRAINING_TASKS)
        return Batch(ids, weights, positions, torch.tensor([order.index(name) for name in names]))

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
        """Token ids of the concatenated segments and their loss weights."""
        ids: list[int] = []
        weights: list[float] = []
        for segment in segments:
            piece = self._encoder.encode(segment.text, add_special_tokens=False).ids
            ids += piece
            if segment.role == "answer":
                weights += self._answer_weights(piece)
            else:
                weights += [PREFIX_WEIGHT if segment.role == "prefix" else 0.0] * len(piece)
        return ids, weights

    def _answer_weights(self, ids: Sequence[int]) -> list[float]:
        """Weight of each answer token by what it takes to predict it."""
        weights = []
        previous_is_digit = False
        for token in ids:
            is_digit = token in self._digits
            if token in self._form:
                weights.append(FORM_WEIGHT)
            else:
                weights.append(DIGIT_WEIGHT if is_digit and previous_is_digit else LOOKUP_WEIGHT)
            previous_is_digit = is_digit
        return weights

    def _skips(self, rng: random.Random, ids: Sequence[int], length: int, span: int) -> Tensor:
        """Extra position of each token: PoSE (Zhu et al., 2023, arXiv 2309.10400) with skips after full stops.

        Positions never seen together at this length are so trained without paying for a context of that length.
        """
        starts = [index + 1 for index, token in enumerate(ids[:-1]) if token == self._full_stop]
        extra = torch.zeros(length, dtype=torch.int64)
        if not starts or span <= length:
            return extra
        skips = sorted(rng.sample(starts, min(len(starts), rng.randint(1, 4))))
        total = rng.randint(0, span - length)
        cuts = sorted(rng.randint(0, total) for _ in skips[1:])
        for start, skip in zip(skips, [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)], strict=True):
            extra[start:] += skip
        return extra
