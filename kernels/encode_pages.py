"""Encoding full pages, once."""

import torch

from .bit_packing import pack
from .dispatch import choose, run
from .page_codes import (
    BITS,
    CARRIED_ERROR,
    FLOOR_UNITS,
    FP8_MAX,
    OUTLIERS,
    SPREAD_ONE,
    SPREAD_STEPS,
    Kind,
    PageCodes,
    spread_values,
)


def encode_pages(tokens: torch.Tensor, kind: Kind, *, keys: bool, backend: str | None = None) -> PageCodes:
    """Quantise and pack pages; their floor and spread bound every channel.

    Parameters
    ----------
    tokens : torch.Tensor
        `(H, N, P, D)` floating point, all P tokens of every page real and finite.
    kind : str
        One of :data:`~pikv_hf.kernels.page_codes.KINDS`; `"none"` returns the tokens as they are.
    keys : bool
        Whether these are keys, whose widest channels get four more bits, or values.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    PageCodes
        Of the same pages. A value outside of float16 (a floor of keys) or of the widest spread (2045) saturates; what
        that does shows in the error of the page, by which a caller chooses a wider kind.
    """
    if kind == "none":
        return PageCodes(kind, tokens.shape[2], tokens)
    how = choose(tokens.device, backend, tokens.shape[-1:])
    if how != "torch":
        encoded: PageCodes = run("encode_pages", how, tokens.device, tokens, kind, keys=keys)
        return encoded
    exact = tokens.float()
    if kind == "fp8":
        return _encode_fp8(exact)
    spread, floor, start = _key_range(exact, kind) if keys else _value_range(exact, kind)
    levels = 2 ** BITS[kind] - 1
    step = spread_values(spread) / levels
    if not keys:
        return PageCodes(kind, tokens.shape[2], pack(_diffuse(exact, start, step, levels), BITS[kind]), spread, floor)
    scaled = (exact - start.unsqueeze(2)) / step.unsqueeze(2)
    codes = scaled.round().clamp_(0, levels)
    outliers = spread.int().topk(min(OUTLIERS, tokens.shape[-1]), dim=-1).indices
    index = outliers.unsqueeze(2).expand(-1, -1, tokens.shape[2], -1)
    rest = (scaled - codes).gather(-1, index)
    fine = pack(((rest + 0.5) * 16).floor_().clamp_(0, 15), 4)
    packed = pack(codes, BITS[kind])
    return PageCodes(kind, tokens.shape[2], packed, spread, floor, outliers.to(torch.int16), fine)


def _key_range(tokens: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return spread codes, stored floors and the floors they stand for, `(H, N, D)` each."""
    low, high = tokens.amin(dim=2), tokens.amax(dim=2)
    # Rounded down, so that the least value is not below the floor, where no code reaches.
    floor = (low - low.abs() * 2.0**-10).clamp(-65504, 65504).half()
    return _spread_codes(high - floor.float(), kind), floor, floor.float()


def _value_range(tokens: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = tokens.amin(dim=2), tokens.amax(dim=2)
    # With 8 bits the floor is up to one unit below the least value; it is at most 128 units away from 0.
    needed = (high - low) * (FLOOR_UNITS / (FLOOR_UNITS - 1)) if kind == "int8" else high - low
    spread = _spread_codes(torch.maximum(needed, low.abs() * (FLOOR_UNITS / 127)), kind)
    unit = spread_values(spread) / FLOOR_UNITS
    floor = low / unit
    floor = floor.floor_() if kind == "int8" else floor.round_()
    floor = floor.clamp_(-128, 127).to(torch.int8)
    return spread, floor, floor.float() * unit


def _diffuse(tokens: torch.Tensor, start: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Round values token by token, each carrying a share of its error to the next."""
    codes = torch.empty_like(tokens)
    carried = torch.zeros_like(start)
    for token in range(tokens.shape[2]):
        wanted = (tokens[:, :, token] + carried - start) / step
        code = wanted.round().clamp_(0, levels)
        codes[:, :, token] = code
        carried = (wanted - code).clamp_(-0.5, 0.5) * (CARRIED_ERROR * step)
    return codes


def _encode_fp8(tokens: torch.Tensor) -> PageCodes:
    spread = _spread_codes(tokens.abs().amax(dim=2), "fp8")
    scaled = tokens * (FP8_MAX / spread_values(spread)).unsqueeze(2)
    codes = scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return PageCodes("fp8", tokens.shape[2], codes, spread)


def _spread_codes(least: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return the codes of spreads that reach `least`, but nearest ones for narrow kinds: clipping costs these less."""
    code = least.clamp_min(2.0**-20).log2() * SPREAD_STEPS + SPREAD_ONE
    code = code.round_() if kind in ("int4", "int2") else code.ceil_()
    return code.clamp_(0, 255).to(torch.uint8)
