"""Ways to quantise a page: what a decoded page looks like, and the bytes it takes."""

import dataclasses
import math
import sys
from typing import Protocol
from unittest import mock

import torch

from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import CARRIED_ERROR, OUTLIERS, Kind, empty_codes

#: Integer kinds by their bits per code.
KIND_OF_BITS: dict[int, Kind] = {8: "int8", 4: "int4", 2: "int2"}

#: Channels per range where a token's channels are divided into groups.
GROUP = 32


class Scheme(Protocol):
    """A way to quantise pages of keys or of values."""

    def __call__(self, pages: torch.Tensor, bits: int) -> torch.Tensor:
        """Return pages `(H, N, P, D)` float32 as they are read back after coding with `bits` bits."""

    def page_bytes(self, bits: int, page_size: int, dim: int) -> float:
        """Return the bytes of a page of one head, parameters included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unchanged:
    """Numbers as they are, of some floating point dtype."""

    dtype: torch.dtype = torch.float32

    def __call__(self, pages: torch.Tensor, bits: int) -> torch.Tensor:
        return pages.to(self.dtype).float()

    def page_bytes(self, bits: int, page_size: int, dim: int) -> float:
        return page_size * dim * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Ranges:
    """Integers between the least and the largest value of a range.

    Attributes
    ----------
    over : str
        What shares a range: a channel of the `"page"`, a `"token"`, or a `"group"` of :data:`GROUP` of its channels.
    rotate : bool
        Rotate the channels by a Hadamard matrix first (QuaRot, arXiv 2404.00456).
    normalise : bool
        Divide each token by its norm first, which is stored in 8 bits.
    finer : int
        Channels of the widest range in a page that carry four more bits.
    log_scale : bool
        Store a range as its logarithm in 8 bits, 12 steps per octave, instead of the step in float16. The least value
        is a float16 either way.
    """

    over: str
    rotate: bool = False
    normalise: bool = False
    finer: int = 0
    log_scale: bool = False

    def __call__(self, pages: torch.Tensor, bits: int) -> torch.Tensor:
        norms = _norms(pages) if self.normalise else torch.ones(())
        rotation = hadamard(pages.shape[-1]) if self.rotate else None
        plain = pages / norms
        decoded = self._quantise(plain if rotation is None else plain @ rotation, bits)
        return (decoded if rotation is None else decoded @ rotation) * norms

    def page_bytes(self, bits: int, page_size: int, dim: int) -> float:
        ranges = {"page": dim, "token": page_size, "group": page_size * math.ceil(dim / GROUP)}[self.over]
        finer = self.finer * (2 + page_size / 2)
        return page_size * (dim * bits / 8 + self.normalise) + ranges * (3 if self.log_scale else 4) + finer

    def _quantise(self, pages: torch.Tensor, bits: int) -> torch.Tensor:
        shape = pages.shape
        if self.over == "group":
            pages = pages.unflatten(-1, (-1, min(GROUP, shape[-1])))
        over = 2 if self.over == "page" else -1
        low = pages.amin(over, keepdim=True)
        # Rounded down, so that the least value is not below the floor, where no code reaches.
        floor = (low - low.abs() * 2.0**-10).half().float()
        step = self._stored_step(pages.amax(over, keepdim=True) - floor, bits)
        codes = ((pages - floor) / step).round_().clamp_(0, 2**bits - 1)
        decoded = torch.addcmul(floor, codes, step)
        if self.finer:
            widest = (pages.amax(2, keepdim=True) - pages.amin(2, keepdim=True)).topk(self.finer, dim=-1).indices
            decoded = _refined(pages, decoded, step, widest)
        return decoded.reshape(shape)

    def _stored_step(self, spread: torch.Tensor, bits: int) -> torch.Tensor:
        levels = 2**bits - 1
        if not self.log_scale:
            return (spread / levels).half().float().clamp_min_(2.0**-20)
        exponent = spread.clamp_min(2.0**-20).log2() * 12
        return torch.exp2((exponent.ceil_() if bits == 8 else exponent.round_()) / 12) / levels


@dataclasses.dataclass(frozen=True, slots=True)
class Shipped:
    """The format of :func:`~pikv_hf.kernels.encode_pages.encode_pages`.

    Attributes
    ----------
    keys : bool
        Whether pages are keys.
    carried : float
        In place of CARRIED_ERROR, the share of a value's error that its page's next token takes over.
    fp8 : bool
        Of the kinds with 8 bits, the floating-point one.
    """

    keys: bool
    carried: float = CARRIED_ERROR
    fp8: bool = False

    def __call__(self, pages: torch.Tensor, bits: int) -> torch.Tensor:
        # The format has no option for it: the share is a constant of the module that encodes.
        with mock.patch.object(sys.modules[encode_pages.__module__], "CARRIED_ERROR", self.carried):
            return decode_pages(encode_pages(pages, self._kind(bits), keys=self.keys), torch.float32)

    def page_bytes(self, bits: int, page_size: int, dim: int) -> float:
        cpu = torch.device("cpu")
        empty = empty_codes(self._kind(bits), 1, page_size, dim, torch.bfloat16, cpu, keys=self.keys)
        return sum(part.shape[2:].numel() * part.element_size() for part in empty.tensors())

    def _kind(self, bits: int) -> Kind:
        return "fp8" if self.fp8 else KIND_OF_BITS[bits]


def hadamard(dim: int) -> torch.Tensor:
    """Return the symmetric orthogonal Hadamard matrix `(dim, dim)` of Sylvester.

    Raises
    ------
    ValueError
        If `dim` is not a power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester has a power of two channels, not {dim}")
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(dim)


def _norms(pages: torch.Tensor) -> torch.Tensor:
    """Return root mean squares of tokens `(H, N, P, 1)`, to a quarter of an octave."""
    return torch.exp2(pages.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8).log2().mul_(4).round_() / 4)


def _refined(exact: torch.Tensor, decoded: torch.Tensor, step: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Code what is missing in `channels` `(H, N, 1, n)` in sixteenths of a step."""
    index = channels.expand(*exact.shape[:-1], -1)
    steps = step.expand_as(exact).gather(-1, index)
    missing = (exact - decoded).gather(-1, index) / steps
    fine = ((missing + 0.5) * 16).floor_().clamp_(0, 15)
    return decoded.scatter_add(-1, index, ((fine + 0.5) / 16 - 0.5) * steps)


def _with_finer(schemes: dict[str, Ranges]) -> dict[str, Scheme]:
    """Return each scheme without and with finer channels."""
    found: dict[str, Scheme] = {}
    for name, scheme in schemes.items():
        found[name] = scheme
        found[f"{name}, {OUTLIERS} finer"] = dataclasses.replace(scheme, finer=OUTLIERS)
    return found


#: Of keys and of values, by name. "shipped" is what the cache uses.
KEY_SCHEMES: dict[str, Scheme] = {
    **_with_finer(
        {
            "per channel": Ranges("page"),
            "per token": Ranges("token"),
            "Hadamard, per token": Ranges("token", rotate=True),
            "Hadamard, per channel": Ranges("page", rotate=True),
            "token norm, per channel": Ranges("page", normalise=True),
        }
    ),
    "shipped": Shipped(keys=True),
}
VALUE_SCHEMES: dict[str, Scheme] = {
    "per token": Ranges("token"),
    f"per token, groups of {GROUP}": Ranges("group"),
    "Hadamard, per token": Ranges("token", rotate=True),
    "per channel": Ranges("page"),
    "per channel, log scale": Ranges("page", log_scale=True),
    "shipped, no carried error": Shipped(keys=False, carried=0.0),
    "shipped": Shipped(keys=False),
}
#: Floating-point numbers, of keys and of values, and their bits.
FLOATS: dict[str, tuple[Scheme, Scheme, int]] = {
    "bf16": (Unchanged(torch.bfloat16), Unchanged(torch.bfloat16), 16),
    "shipped fp8": (Shipped(keys=True, fp8=True), Shipped(keys=False, fp8=True), 8),
}
