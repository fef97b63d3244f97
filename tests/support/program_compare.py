"""Comparing what programs show: logits within rounding, tokens exactly."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs between two shown values.

    Attributes
    ----------
    message : str
        In words.
    off : float
        How far logits are apart, infinite where there are none to compare.
    allowed : float
        How far they may be.
    gap : float
        Where tokens differ, by how much DynamicCache likes its own better.
    tokens : bool
        Whether tokens, or shapes, differ.
    index : int or None
        Of the shown value; None for what was not shown.
    """

    message: str
    off: float = math.inf
    allowed: float = 0.0
    gap: float = 0.0
    tokens: bool = False
    index: int | None = None


def tolerance(theirs: torch.Tensor) -> float:
    """Return how far fp32 logits may differ: 1e-4, or more where they are large."""
    return 1e-4 * max(1.0, float(theirs.nan_to_num().abs().max()) / 10) if theirs.numel() else 0.0


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, but where DynamicCache itself has no number."""
    off = (ours.detach().double() - theirs.detach().double()).abs()[~theirs.isnan()]
    return float(off.max()) if off.numel() else 0.0


def pairs(ours: Any, theirs: Any, where: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield what a shown value has to compare, by name: the steps of an answer first."""
    if isinstance(theirs, torch.Tensor):
        # What is of other tokens has another shape, which is what is to be said of it.
        shown = slice(None) if where is None or ours.shape != theirs.shape else where.bool()
        yield "tokens" if theirs.dtype == torch.long else "logits", ours[shown], theirs[shown]
        return
    # Of beams, tokens and logits of a step are in different orders.
    if theirs.logits is not None and ours.logits is not None and not hasattr(theirs, "beam_indices"):
        prompt = theirs.sequences.shape[1] - len(theirs.logits)
        for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=False)):
            yield f"logits of step {step}", a, b
            yield "tokens", ours.sequences[:, : prompt + step + 1], theirs.sequences[:, : prompt + step + 1]
    yield "tokens", ours.sequences, theirs.sequences


def difference(ours: Any, theirs: Any, where: torch.Tensor | None) -> Difference | None:
    """Return the first difference of a shown value, None if there is none."""
    off, logits = math.inf, None
    for name, a, b in pairs(ours, theirs, where):
        if a.shape != b.shape:
            return Difference(f"{name}: shape {tuple(a.shape)}, not {tuple(b.shape)}", tokens=True)
        if name != "tokens":
            off, logits, allowed = distance(a, b), b, tolerance(b)
            if not off <= allowed:
                return Difference(f"{name} differ by {off:.1e}", off, allowed)
        elif not torch.equal(a, b):
            gap = math.inf if logits is None else _gap(logits, a[:, -1], b[:, -1])
            allowed = 0.0 if logits is None else tolerance(logits)
            return Difference(f"tokens differ: {a.tolist()}, not {b.tolist()}", off, allowed, gap, tokens=True)
    return None


def farthest(ours: Any, theirs: Any, where: torch.Tensor | None) -> float:
    """Return the largest difference of the logits of a shown value, up to where tokens differ."""
    off = 0.0
    for name, a, b in pairs(ours, theirs, where):
        if a.shape != b.shape or (name == "tokens" and not torch.equal(a, b)):
            break
        if name != "tokens":
            off = max(off, distance(a, b))
    return off


def _gap(logits: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return how much lower logits `(B, V)` are at our tokens `(B,)` than at theirs, infinite if those are not best."""
    rows = (ours != theirs).nonzero().squeeze(1)
    best = logits[rows].max(dim=1).values
    if not torch.equal(logits[rows, theirs[rows]], best):
        return math.inf
    return float((best - logits[rows, ours[rows]]).max())
