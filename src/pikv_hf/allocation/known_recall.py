"""What is remembered of how well the stored tokens of a layer would be recalled, from call to call."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class KnownRecall:
    """How well tokens would be recalled, in two bytes for each that is stored and an eighth of one for each column.

    Attributes
    ----------
    known : torch.Tensor
        `(B, H, ceil(T / 8))` uint8, a bit for each column: whether it is known.
    masses : torch.Tensor
        `(n,)` bfloat16 of :func:`~pikv_hf.allocation.recall.recall_mass`, row by row, head by head, by column.
    columns : int
        T; nothing is known of later tokens.
    first : torch.Tensor
        `(B, H, S, D)`, the first keys of each sequence, with which later ones compete for attention.
    """

    known: torch.Tensor
    masses: torch.Tensor
    columns: int
    first: torch.Tensor

    @classmethod
    def of(cls, mass: torch.Tensor, first: torch.Tensor) -> "KnownRecall":
        """Return what `(B, H, T)` floating point numbers say, NaN where nothing is known."""
        known = ~mass.isnan()
        bits = pad(known, (0, -known.shape[2] % 8)).unflatten(2, (-1, 8)).to(torch.uint8)
        return cls((bits << _places(mass)).sum(dim=3, dtype=torch.uint8), mass[known].bfloat16(), mass.shape[2], first)

    def mass(self, columns: int) -> torch.Tensor:
        """Return `(B, H, columns)` float32, NaN where nothing is known."""
        bits = (self.known[..., None] >> _places(self.known)) & 1
        known = bits.flatten(2)[:, :, : self.columns].bool()
        mass = torch.full(known.shape, torch.nan, dtype=torch.float32, device=known.device)
        mass[known] = self.masses.float()
        return pad(mass[:, :, :columns], (0, max(0, columns - self.columns)), value=torch.nan)

    def pick(self, rows: torch.Tensor) -> "KnownRecall":
        """Return the same of the sequences at `rows` `(n,)`."""
        return KnownRecall.of(self.mass(self.columns)[rows], self.first[rows])

    def only(self, stored: torch.Tensor) -> "KnownRecall":
        """Return the same of tokens that are stored, `(B, H, T)` bool with at least as many columns."""
        known = stored[:, :, : self.columns]
        return KnownRecall.of(self.mass(known.shape[2]).where(known, torch.nan), self.first)

    def cropped(self, columns: int) -> "KnownRecall":
        """Return the same of the first columns."""
        return self if columns >= self.columns else KnownRecall.of(self.mass(columns), self.first)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self.known, self.masses, self.first]


def _places(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def filled_recall(known: torch.Tensor, attention: torch.Tensor, stored: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return how well all tokens would be recalled: those of which it is not known like most of their head.

    These are what was generated: nothing that follows a token has been read together with it. Among themselves they
    count by the attention that the latest queries paid to them.

    Parameters
    ----------
    known : torch.Tensor
        `(B, H, T)` float32, NaN where it is not known.
    attention : torch.Tensor
        `(B, H, T)` float32, not negative.
    stored : torch.Tensor
        `(B, H, T)` bool.
    smoothing : float
        Share of the attention that is spread evenly.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32 in [0, 1]; 0 where nothing is stored.
    """
    usual = known.where(stored, torch.nan).nanmean(dim=2, keepdim=True).nan_to_num(0.0)
    paid = attention * stored
    even = paid.sum(dim=2, keepdim=True) / stored.sum(dim=2, keepdim=True).clamp(min=1)
    share = paid / even.clamp(min=torch.finfo(paid.dtype).tiny)
    estimate = (usual * ((1 - smoothing) * share + smoothing)).clamp(max=1.0)
    return known.where(~known.isnan(), estimate) * stored
