"""The format of packed pages: what every kernel that reads or writes them agrees on.

A page of P tokens is quantised channel by channel over its own tokens. With b bits, channel d of token t is

    floor[d] + spread[d] * code[t, d] / (2**b - 1)

Per-channel ranges over a short page hold a few huge channels and constant offsets as well as ordinary ones, and a key's
floor and floor + spread are also the least and largest value that routing bounds a page by. Keys keep a float16 floor
and four more bits for their OUTLIERS widest channels; values keep the floor as a multiple of spread / 32 in one byte.
`eval/results/codec-schemes.json` has the schemes that were compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import torch

from .bit_packing import pack, unpack

Kind = Literal["none", "int8", "int4", "int2", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Bits per code of the integer kinds.
BITS = {"int8": 8, "int4": 4, "int2": 2}

#: Channels of a page of keys that carry four more bits.
OUTLIERS = 4

#: A spread is stored as the logarithm of base 2 in steps of 1 / SPREAD_STEPS, SPREAD_ONE standing for 1.
SPREAD_STEPS, SPREAD_ONE = 12, 120

_RANGES = torch.exp2((torch.arange(256, device="cpu").float() - SPREAD_ONE) / SPREAD_STEPS)

#: A floor of values is stored in units of spread / FLOOR_UNITS.
FLOOR_UNITS = 32

#: Values pass this share of their rounding error on to the page's next token: attention that spreads over a page then
#: averages it away, at little cost where it looks at one token.
CARRIED_ERROR = 1 / 3

#: The largest number that float8 e4m3 holds.
FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True, slots=True)
class PageCodes:
    """Keys or values of N pages of H KV heads.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    page_size : int
        P, tokens per page.
    codes : torch.Tensor
        `"none"`: `(H, N, P, D)` floating point. `"fp8"`: `(H, N, P, D)` uint8, bits of float8 e4m3. Integers:
        `(H, N, R, D)` uint8 with `R = ceil(P / (8 / bits))`; the byte in row r holds the codes of the tokens
        `r, r + R, r + 2R, ...`, lowest bits first.
    spread : torch.Tensor or None
        `(H, N, D)` uint8, the range of each channel, `2 ** ((spread - SPREAD_ONE) / SPREAD_STEPS)`; for `"fp8"` the
        number that stands for FP8_MAX.
    floor : torch.Tensor or None
        `(H, N, D)`, the least value of each channel: float16 for keys, for values int8 in units of
        `spread / FLOOR_UNITS`.
    outliers : torch.Tensor or None
        `(H, N, OUTLIERS)` int16, distinct channels of keys.
    fine : torch.Tensor or None
        `(H, N, ceil(P / 2), OUTLIERS)` uint8, for each of them a number f of 0..15 per token, packed as int4 codes are:
        `spread / (2**b - 1) * ((f + 0.5) / 16 - 0.5)` is added.
    latent : torch.Tensor or None
        `(H, N, P, L)` floating point, L further channels stored as they are: the coefficients of a low-rank part, the
        codes being its residual. Queries and outputs then have D + L channels, these last.
    """

    kind: Kind
    page_size: int
    codes: torch.Tensor
    spread: torch.Tensor | None = None
    floor: torch.Tensor | None = None
    outliers: torch.Tensor | None = None
    fine: torch.Tensor | None = None
    latent: torch.Tensor | None = None

    @property
    def dim(self) -> int:
        """D, the channels that are coded."""
        return self.codes.shape[-1]

    @property
    def width(self) -> int:
        """D + L, the channels of a query or an output."""
        return self.dim + (0 if self.latent is None else self.latent.shape[-1])

    @property
    def heads(self) -> int:
        """H, KV heads."""
        return self.codes.shape[0]

    @property
    def pages(self) -> int:
        """N, pages."""
        return self.codes.shape[1]

    @property
    def levels(self) -> int:
        """Steps between the least and the largest code of an integer kind."""
        return 2 ** BITS[self.kind] - 1

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold the memory, `(H, N, ...)` each."""
        parts = (self.codes, self.spread, self.floor, self.outliers, self.fine, self.latent)
        return [part for part in parts if part is not None]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PageCodes":
        """Return the codes with every tensor changed alike."""
        return PageCodes(
            self.kind,
            self.page_size,
            change(self.codes),
            None if self.spread is None else change(self.spread),
            None if self.floor is None else change(self.floor),
            None if self.outliers is None else change(self.outliers),
            None if self.fine is None else change(self.fine),
            None if self.latent is None else change(self.latent),
        )

    def narrow(self, start: int, stop: int) -> "PageCodes":
        """Return pages `start..stop-1`, views of these."""
        return self.map(lambda tensor: tensor[:, start:stop])

    def pick(self, index: torch.Tensor) -> "PageCodes":
        """Return copies of the pages at `index` `(n,)`."""
        return self.map(lambda tensor: tensor.index_select(1, index))


def coded_dims(*pages: PageCodes) -> list[int]:
    """Return the channels of those that are packed."""
    return [each.dim for each in pages if each.kind != "none"]


def packed_rows(kind: Kind, page_size: int) -> int:
    """Return R, the rows of codes of a page."""
    if kind not in BITS:
        return page_size
    per_byte = 8 // BITS[kind]
    return (page_size + per_byte - 1) // per_byte


def empty_codes(
    kind: Kind,
    heads: int,
    page_size: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keys: bool,
    rank: int = 0,
) -> PageCodes:
    """Return the codes of no pages, `N = 0`, of keys or of values.

    `dtype` is that of what is stored as it is, `rank` the number L of latent channels.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.zeros((heads, 0, *shape), dtype=dtype, device=device)

    codes = empty(packed_rows(kind, page_size), dim, dtype=dtype if kind == "none" else torch.uint8)
    spread = None if kind == "none" else empty(dim)
    floor = outliers = fine = None
    if kind in BITS:
        floor = empty(dim, dtype=torch.float16 if keys else torch.int8)
        if keys:
            few = min(OUTLIERS, dim)
            outliers, fine = empty(few, dtype=torch.int16), empty(packed_rows("int4", page_size), few)
    latent = empty(page_size, rank, dtype=dtype) if rank else None
    return PageCodes(kind, page_size, codes, spread, floor, outliers, fine, latent)


def spread_values(spread: torch.Tensor) -> torch.Tensor:
    """Return the ranges that spread codes stand for, float32."""
    if spread.device.type == "cpu":
        # Looked up: a processor takes four times as long for the powers.
        return _RANGES.index_select(0, spread.reshape(-1).int()).view(spread.shape)
    return torch.exp2((spread.float() - SPREAD_ONE) / SPREAD_STEPS)


def floor_values(codes: PageCodes) -> torch.Tensor:
    """Return the least value of each channel of an integer kind, `(H, N, D)` float32."""
    assert codes.floor is not None
    assert codes.spread is not None
    if codes.floor.dtype == torch.int8:
        return codes.floor.float() * (spread_values(codes.spread) / FLOOR_UNITS)
    return codes.floor.float()


def reordered(codes: PageCodes, order: torch.Tensor) -> PageCodes:
    """Return pages with their tokens in another order; what each is decoded to stays as it is.

    Parameters
    ----------
    codes : PageCodes
        N pages.
    order : torch.Tensor
        `(N, P)` int64, the place in the old page of each token of the new one.
    """

    def moved(tokens: torch.Tensor) -> torch.Tensor:
        index = order[None, :, :, None].expand(tokens.shape[0], -1, -1, tokens.shape[-1])
        return tokens.gather(2, index)

    def moved_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return pack(moved(unpack(packed, bits, codes.page_size)), bits)

    return dataclasses.replace(
        codes,
        codes=moved_codes(codes.codes, BITS[codes.kind]) if codes.kind in BITS else moved(codes.codes),
        fine=None if codes.fine is None else moved_codes(codes.fine, 4),
        latent=None if codes.latent is None else moved(codes.latent),
    )
