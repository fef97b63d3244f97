"""Move queries to later positions: rotary embeddings of a query add up, so one more rotation is all it takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RotaryLayout:
    """Which channels an attention module rotates, and in which pairs.

    Attributes
    ----------
    pairs : str
        `"halves"`: channel i of the first half with channel i of the second (llama). `"neighbours"`: channels 2i and
        2i + 1 (GPT-J, GLM). `"none"`: it rotates nothing.
    angles : str
        How a module is given the cosine of R / 2 angles: `"twice"` one after another, `"repeated"` each two times in a
        row, or `"once"`.
    last : bool
        Whether the last channels are rotated, instead of the first.
    """

    pairs: str = "none"
    angles: str = "once"
    last: bool = False

    @classmethod
    def all(cls) -> "Iterator[RotaryLayout]":
        """Yield all that are known."""
        for pairs in ("halves", "neighbours"):
            for angles in ("twice", "repeated", "once"):
                for last in (False, True):
                    yield cls(pairs, angles, last)
        yield cls()

    def distinct(self, table: torch.Tensor) -> torch.Tensor:
        """Return the R / 2 different entries of a cosine or sine `(..., W)`."""
        if self.angles == "twice":
            return table[..., : table.shape[-1] // 2]
        return table[..., ::2] if self.angles == "repeated" else table


@dataclass(frozen=True, slots=True)
class Turn:
    """The rotation by some number of positions.

    Attributes
    ----------
    cos, sin : torch.Tensor
        `(B or 1, T or 1, W)` float32 of its angles, as the module is given those of positions.
    layout : RotaryLayout
        Of the module.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    layout: RotaryLayout

    @classmethod
    def between(cls, start: tuple[torch.Tensor, torch.Tensor], end: tuple[torch.Tensor, torch.Tensor]) -> "Turn":
        """Return the rotation from one position to another; `(cos, sin)` of both, `(B or 1, T or 1, W)` each.

        A factor on both, as YaRN has it, is in the queries already and drops out.
        """
        cos, sin = (part.float() for part in start)
        later_cos, later_sin = (part.float() for part in end)
        size = cos.square() + sin.square()
        return cls(
            (later_cos * cos + later_sin * sin) / size, (later_sin * cos - later_cos * sin) / size, RotaryLayout()
        )

    def by(self, layout: RotaryLayout) -> "Turn":
        """Return the same of another layout."""
        return Turn(self.cos, self.sin, layout)

    def back(self) -> "Turn":
        """Return the rotation the other way: a query that is turned meets a key as it meets the key turned back."""
        return Turn(self.cos, -self.sin, self.layout)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return queries or keys `(B, H, T, D)` as they would have been so many positions later, in float32.

        Raises
        ------
        ValueError
            If there are more angles than pairs of channels.
        """
        states = states.float()
        if self.layout.pairs == "none":
            return states
        cos, sin = (self.layout.distinct(part).unsqueeze(1) for part in (self.cos, self.sin))
        rotated = 2 * cos.shape[-1]
        if rotated > states.shape[-1]:
            raise ValueError(f"rotating {rotated} channels needs as many, got {states.shape[-1]}")
        first = states.shape[-1] - rotated if self.layout.last else 0
        before, part, after = states.split([first, rotated, states.shape[-1] - first - rotated], dim=-1)
        neighbours = self.layout.pairs == "neighbours"
        a, b = (part[..., ::2], part[..., 1::2]) if neighbours else part.chunk(2, dim=-1)
        turned = a * cos - b * sin, b * cos + a * sin
        part = torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)
        return torch.cat([before, part, after], dim=-1)
