"""Encoding full pages, each in the narrowest codec that holds it well enough."""

import dataclasses

import numpy as np
import torch

from ..common.kv import KV
from ..config import PiKVConfig
from ..kernels.page_codes import PageCodes
from .codec import Codec, is_lowrank

#: The rungs of the integer codecs, narrow to wide.
LADDER = ("int2", "int4", "int8", "none")

#: A page goes to a wider codec where the root mean square error of a head exceeds this share of the head's mean
#: absolute value, of keys after their channels' means, which shift all logits alike, are taken off. About twice what
#: ordinary pages have, and below what one huge token does to the ranges of its page
#: (`eval/results/codec-schemes.json`).
GUARD = {"int8": 0.014, "int4": 0.2, "int2": 1.2}


@dataclasses.dataclass(frozen=True, slots=True)
class PageErrors:
    """How far encoded pages are from what they were.

    Attributes
    ----------
    energy, lost : numpy.ndarray
        `(n,)` float32, sum of squares of the tokens and of their errors, over all heads.
    logits : numpy.ndarray
        `(n,)` float32, mean square error of the attention logits of recent queries; NaN if none were seen, and for
        values.
    """

    energy: np.ndarray
    lost: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """Pages in the codes of one codec, out of those that were to be encoded.

    Attributes
    ----------
    codec : Codec
        What encodes them.
    which : numpy.ndarray
        `(n,)` int64, the pages, as numbers within what was to be encoded.
    codes : PageCodes
        Of these pages, in this order.
    errors : PageErrors
        Of these pages.
    """

    codec: Codec
    which: np.ndarray
    codes: PageCodes
    errors: PageErrors


class PageEncoder:
    """Encodes full pages of the keys, or the values, of one layer and chooses a codec for each page.

    Parameters
    ----------
    name : str
        The codec of the configuration; `"auto"` starts with the narrowest.
    which : KV
        Keys or values.
    config : PiKVConfig
        Error budget and rank.
    """

    def __init__(self, name: str, which: KV, config: PiKVConfig) -> None:
        self.name, self.which = name, which
        self.budget = config.error_budget
        self.rank = config.rank
        self.codecs: dict[str, Codec] = {}

    @property
    def rungs(self) -> tuple[str, ...]:
        """The codecs to try in turn."""
        if self.name == "auto":
            return LADDER
        return LADDER[LADDER.index(self.name) :] if self.name in LADDER else (self.name,)

    def codec(self, name: str, dim: int) -> Codec:
        """Return this layer's codec of that name."""
        if name not in self.codecs:
            self.codecs[name] = Codec(name, self.which, (self.rank or max(1, dim // 4)) if is_lowrank(name) else 0)
        return self.codecs[name]

    def is_ready(self, tokens: int, dim: int) -> bool:
        """Return whether pages of so many tokens can be encoded now."""
        return self.codec(self.rungs[0], dim).is_ready(tokens, dim)

    def encode(
        self, tokens: torch.Tensor, queries: torch.Tensor | None, scale: float, guarded: bool = True
    ) -> list[Encoded]:
        """Encode pages, each in the first codec that does it well enough.

        Parameters
        ----------
        tokens : torch.Tensor
            `(H, n, P, D)`.
        queries : torch.Tensor, optional
            `(H, m, D)` recent queries of each KV head.
        scale : float
            Factor on their logits.
        guarded : bool
            Whether a page may go to a wider codec; else all that is finite takes the first.

        Returns
        -------
        list of Encoded
            Every page once.
        """
        # No code and no basis can hold what is not finite.
        finite = tokens.isfinite().flatten(2).all(dim=2).all(dim=0).cpu().numpy()
        left, wild = np.flatnonzero(finite), np.flatnonzero(~finite)
        done: list[Encoded] = []
        for name in self.rungs:
            if not len(left) or name == "none":
                break
            pages = _picked(tokens, left)
            codec = self.codec(name, tokens.shape[-1])
            codes = codec.encode(pages)
            errors, good = self._judge(name, pages, codec.decode(codes, torch.float32), queries, scale)
            good |= not guarded
            taken = np.flatnonzero(good)
            if len(taken):
                fields = (getattr(errors, field.name)[taken] for field in dataclasses.fields(PageErrors))
                kept = codes if good.all() else codes.pick(torch.from_numpy(taken).to(tokens.device))
                done.append(Encoded(codec, left[taken], kept, PageErrors(*fields)))
            left = left[~good]
        if len(rest := np.sort(np.concatenate([left, wild]))):
            done.append(self._untouched(_picked(tokens, rest), rest))
        return done

    def _untouched(self, pages: torch.Tensor, which: np.ndarray) -> Encoded:
        energy = pages.float().square().sum(dim=(2, 3)).sum(dim=0).cpu().numpy()
        zeros = np.zeros(len(which), dtype=np.float32)
        codec = self.codec("none", pages.shape[-1])
        return Encoded(codec, which, codec.encode(pages), PageErrors(energy, zeros, zeros))

    def _judge(
        self, name: str, pages: torch.Tensor, decoded: torch.Tensor, queries: torch.Tensor | None, scale: float
    ) -> tuple[PageErrors, np.ndarray]:
        exact = pages.float()
        error = decoded.sub_(exact)
        lost, energy = error.square().sum(dim=(2, 3)), exact.square().sum(dim=(2, 3))
        logits = None
        if self.which is KV.KEYS and queries is not None:
            logits = torch.matmul(error.flatten(1, 2), queries.float().transpose(1, 2) * scale).square_()
            logits = logits.view(*pages.shape[:3], -1).mean(dim=(2, 3))
        good = torch.ones(pages.shape[1], dtype=torch.bool, device=pages.device)
        if name in GUARD:
            telling = exact - exact.mean(dim=2, keepdim=True) if self.which is KV.KEYS else exact
            size = telling.abs().mean(dim=(2, 3)).clamp_min_(torch.finfo(torch.float32).tiny)
            ratio = (lost / pages[0, 0].numel()).sqrt_() / size
            # Written so that NaN, the error of keys that are not finite, is not good.
            good &= (ratio <= GUARD[name]).all(dim=0)
            if self.name == "auto":
                relative = logits if logits is not None else lost / energy.clamp_min(torch.finfo(torch.float32).tiny)
                good &= (relative <= self.budget**2).all(dim=0)
        nan = torch.full_like(lost[0], torch.nan)
        figures = energy.sum(dim=0), lost.sum(dim=0), nan if logits is None else logits.mean(dim=0)
        return PageErrors(*(figure.cpu().numpy() for figure in figures)), good.cpu().numpy()


def _picked(tokens: torch.Tensor, which: np.ndarray) -> torch.Tensor:
    return tokens if len(which) == tokens.shape[1] else tokens[:, torch.from_numpy(which).to(tokens.device)]
