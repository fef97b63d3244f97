"""Windows of text whose perplexity is measured: stretches of a document, or the reference model's own rounds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.reference.synthetic import make_shared_samples


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of text.

    Attributes
    ----------
    id : str
        Unique within a run.
    ids : torch.Tensor
        `(1, T)` int64 token ids.
    prefill : int
        Tokens that are read, and compressed, before the rest goes through the cache; at least 1.
    scored : torch.Tensor
        `(T,)` bool: the tokens whose likelihood counts. None of the prefill.
    """

    id: str
    ids: torch.Tensor
    prefill: int
    scored: torch.Tensor


def text_windows(ids: torch.Tensor, length: int, most: int, prefill: int) -> list[Window]:
    """Cut `(N,)` token ids into at most `most` windows of `length` tokens, evenly spread over the text.

    Every token behind the prefill is scored. Windows overlap where the text is too short for as many apart; no two are
    the same. Without prefill a window's first token is read as one, since nothing precedes it.

    Raises
    ------
    InputError
        If the text is shorter than one window.
    """
    room = ids.shape[0] - length
    if room < 0:
        raise InputError(f"the text has {ids.shape[0]} tokens, fewer than one window of {length}")
    count = min(most, room + 1)
    starts = [round(index * room / max(1, count - 1)) for index in range(count)]
    read = max(prefill, 1)
    scored = torch.arange(length, device=ids.device) >= read
    return [
        Window(f"perplexity-{index:04d}", ids[None, start : start + length], read, scored)
        for index, start in enumerate(starts)
    ]


def reference_windows(tokenizer: Any, length: int, most: int, seed: int, device: torch.device) -> list[Window]:
    """Return documents of the bundled model's training format, of at most `length` tokens each.

    The haystack is the prefill; of the rounds of questions behind it the answers are scored. Anything else in such a
    document is random, or was never trained.
    """
    return [
        _reference_window(tokenizer, length, random.Random(f"perplexity {seed} {length} {index}"), index, device)
        for index in range(most)
    ]


def _reference_window(tokenizer: Any, length: int, rng: random.Random, index: int, device: torch.device) -> Window:
    samples = make_shared_samples(length, rng)
    context = tokenizer(samples[0].context).input_ids
    pieces: list[tuple[Sequence[int], bool]] = [(context, False)]
    for sample in samples:
        asked = f"{sample.question}\n{sample.answer_prefix}"
        pieces.append((tokenizer(asked, add_special_tokens=False).input_ids, False))
        pieces.append((tokenizer(f" {sample.answer}.<eos>", add_special_tokens=False).input_ids, True))
    ids = [token for piece, _ in pieces for token in piece]
    scored = [counts for piece, counts in pieces for _ in piece]
    return Window(
        f"perplexity-{index:04d}",
        torch.tensor([ids], device=device),
        len(context),
        torch.tensor(scored, device=device),
    )
