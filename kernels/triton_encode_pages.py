# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.encode_pages.encode_pages`: one program packs one page of one head."""

import torch
import triton
import triton.language as tl

from .page_codes import BITS, OUTLIERS, Kind, PageCodes, packed_rows
from .triton_basics import row_max, spread_share

# Constants of the packed format, see page_codes.
_STEPS: tl.constexpr = tl.constexpr(12.0)
_ONE: tl.constexpr = tl.constexpr(120.0)
_UNITS: tl.constexpr = tl.constexpr(32.0)
_CARRIED: tl.constexpr = tl.constexpr(1.0 / 3.0)


@triton.jit
def _rint(x):
    # Half to even, for |x| < 2**22: beyond that float32 has no fractions.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _spread_code(least, NEAREST: tl.constexpr):
    """Return the codes (float32) of spreads that reach `least`, or of the nearest ones."""
    code = tl.log2(tl.maximum(least, 2.0**-20)) * _STEPS + _ONE
    code = _rint(code) if NEAREST else tl.ceil(code)
    return tl.minimum(tl.maximum(code, 0.0), 255.0)


@triton.jit
def _step(code, LEVELS: tl.constexpr):
    return spread_share(code.to(tl.int32), 0.0, False) / LEVELS


@triton.jit
def _load_rows(tokens, first, r, d, token_stride, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, other):
    t = first + r
    mask = ((r < ROWS) & (t < P))[:, None] & (d < D)[None, :]
    return tl.load(tokens + t[:, None] * token_stride + d[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def _range(tokens, r, d, token_stride, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Return the least and the largest value of each channel."""
    low = -row_max(-_load_rows(tokens, 0, r, d, token_stride, P, D, ROWS, float("inf")), 0)
    high = row_max(_load_rows(tokens, 0, r, d, token_stride, P, D, ROWS, float("-inf")), 0)
    for plane in tl.static_range(1, PLANES):
        rows = _load_rows(tokens, plane * ROWS, r, d, token_stride, P, D, ROWS, float("inf"))
        low = tl.minimum(low, -row_max(-rows, 0))
        rows = _load_rows(tokens, plane * ROWS, r, d, token_stride, P, D, ROWS, float("-inf"))
        high = tl.maximum(high, row_max(rows, 0))
    return low, high


@triton.jit
def _code(tokens, start, step, LEVELS: tl.constexpr):
    return tl.minimum(tl.maximum(_rint((tokens - start) / step), 0.0), LEVELS)


@triton.jit
def _encode_keys_kernel(
    tokens, codes, spread, floor, outliers, fine, pages, head_stride, page_stride, token_stride,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, FEW: tl.constexpr, FINE_ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    page = tl.program_id(0).to(tl.int64)
    tokens += page // pages * head_stride + page % pages * page_stride
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    low, high = _range(tokens, r, d, token_stride, P, D, ROWS, PLANES)
    low = tl.where(d < D, low, 0.0)
    high = tl.where(d < D, high, 0.0)
    # Rounded down, so that the least value is not below the floor, where no code reaches.
    stored = tl.minimum(tl.maximum(low - tl.abs(low) * 0.0009765625, -65504.0), 65504.0).to(tl.float16)
    start = stored.to(tl.float32)
    code = _spread_code(high - start, BITS < 8)
    step = _step(code, LEVELS)
    tl.store(spread + page * D + d, code.to(tl.uint8), mask=d < D)
    tl.store(floor + page * D + d, stored, mask=d < D)
    packed = tl.full((BLOCK_R, BLOCK_D), 0, tl.int32)
    for plane in tl.static_range(PLANES):
        rows = _load_rows(tokens, plane * ROWS, r, d, token_stride, P, D, ROWS, 0.0)
        numbers = _code(rows, start[None, :], step[None, :], LEVELS).to(tl.int32)
        # The rows of the last plane may outnumber its tokens.
        packed |= tl.where((plane * ROWS + r < P)[:, None], numbers, 0) << (plane * BITS)
    target = codes + page * (ROWS * D) + r[:, None] * D + d[None, :]
    tl.store(target, packed.to(tl.uint8), mask=(r < ROWS)[:, None] & (d < D)[None, :])

    # The widest channels one by one, the first of equals: their codes with their numbers reversed behind them.
    f = tl.arange(0, BLOCK_F)
    ranked = tl.where(d < D, code.to(tl.int32) * 65536 + (65535 - d), -1)
    for j in tl.static_range(FEW):
        top = row_max(ranked, 0)
        channel = 65535 - top % 65536
        ranked = tl.where(d == channel, -1, ranked)
        tl.store(outliers + page * FEW + j, channel.to(tl.int16))
        of_start = -row_max(tl.where(d == channel, -start, float("-inf")), 0)
        of_step = _step((top // 65536).to(tl.float32), LEVELS)
        byte = tl.full((BLOCK_F,), 0, tl.int32)
        for half in tl.static_range(2):
            t = half * FINE_ROWS + f
            mask = (f < FINE_ROWS) & (t < P)
            scaled = (
                tl.load(tokens + t * token_stride + channel, mask=mask, other=0.0).to(tl.float32) - of_start
            ) / of_step
            rest = scaled - tl.minimum(tl.maximum(_rint(scaled), 0.0), LEVELS)
            number = tl.minimum(tl.maximum(tl.floor((rest + 0.5) * 16.0), 0.0), 15.0).to(tl.int32)
            byte |= tl.where(mask, number, 0) << (4 * half)
        tl.store(fine + page * (FINE_ROWS * FEW) + f * FEW + j, byte.to(tl.uint8), mask=f < FINE_ROWS)


@triton.jit
def _encode_values_kernel(
    tokens, codes, spread, floor, pages, head_stride, page_stride, token_stride,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    page = tl.program_id(0).to(tl.int64)
    tokens += page // pages * head_stride + page % pages * page_stride
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    low, high = _range(tokens, r, d, token_stride, P, D, ROWS, PLANES)
    low = tl.where(d < D, low, 0.0)
    high = tl.where(d < D, high, 0.0)
    # With 8 bits the floor is up to one unit below the least value; it is at most 128 units away from 0.
    needed = (high - low) * (_UNITS / (_UNITS - 1.0)) if BITS == 8 else high - low
    code = _spread_code(tl.maximum(needed, tl.abs(low) * (_UNITS / 127.0)), BITS < 8)
    unit = spread_share(code.to(tl.int32), 0.0, False) / _UNITS
    units = tl.floor(low / unit) if BITS == 8 else _rint(low / unit)
    units = tl.minimum(tl.maximum(units, -128.0), 127.0)
    start = units * unit
    step = _step(code, LEVELS)
    tl.store(spread + page * D + d, code.to(tl.uint8), mask=d < D)
    tl.store(floor + page * D + d, units.to(tl.int8), mask=d < D)
    packed = tl.full((BLOCK_R, BLOCK_D), 0, tl.int32)
    carried = tl.full((BLOCK_D,), 0.0, tl.float32)
    for plane in tl.static_range(PLANES):
        for row in range(0, ROWS):
            t = plane * ROWS + row
            token = tl.load(tokens + t * token_stride + d, mask=d < tl.where(t < P, D, 0), other=0.0).to(tl.float32)
            wanted = (token + carried - start) / step
            number = tl.minimum(tl.maximum(_rint(wanted), 0.0), LEVELS)
            carried = tl.minimum(tl.maximum(wanted - number, -0.5), 0.5) * (_CARRIED * step)
            here = tl.where(t < P, number.to(tl.int32), 0) << (plane * BITS)
            packed |= tl.where((r == row)[:, None], here[None, :], 0)
    target = codes + page * (ROWS * D) + r[:, None] * D + d[None, :]
    tl.store(target, packed.to(tl.uint8), mask=(r < ROWS)[:, None] & (d < D)[None, :])


@triton.jit
def _encode_fp8_kernel(
    tokens, codes, spread, pages, head_stride, page_stride, token_stride,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(0).to(tl.int64)
    tokens += page // pages * head_stride + page % pages * page_stride
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    rows = _load_rows(tokens, 0, r, d, token_stride, P, D, P, 0.0)
    code = _spread_code(row_max(tl.abs(rows), 0), False)
    tl.store(spread + page * D + d, code.to(tl.uint8), mask=d < D)
    scaled = rows * (448.0 / spread_share(code.to(tl.int32), 0.0, False))[None, :]
    size = tl.minimum(tl.abs(scaled), 448.0)
    # With e the exponent, at least -6, numbers are multiples of 2**(e - 3), and codes count them up to 2**(e + 1).
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    multiple = _rint(size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.int32)
    byte = (exponent + 6) * 8 + multiple + tl.where(scaled < 0.0, 128, 0)
    target = codes + page * (P * D) + r[:, None] * D + d[None, :]
    tl.store(target, byte.to(tl.uint8), mask=(r < P)[:, None] & (d < D)[None, :])


def encode_pages(tokens: torch.Tensor, kind: Kind, *, keys: bool) -> PageCodes:
    """Launch the kernel of a kind other than "none"; see the public function."""
    if tokens.stride(3) != 1:
        tokens = tokens.contiguous()
    heads, pages, size, dim = tokens.shape
    rows = packed_rows(kind, size)

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty((heads, pages, *shape), dtype=dtype, device=tokens.device)

    codes, spread = empty(rows, dim), empty(dim)
    floor = outliers = fine = None
    grid = (heads * pages,)
    common = {
        "P": size, "D": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_R": triton.next_power_of_2(rows),
        "num_warps": 4 if rows * dim <= 4096 else 8,
    }  # fmt: skip
    inputs = (pages, *tokens.stride()[:3])
    if kind in BITS:
        floor = empty(dim, dtype=torch.float16 if keys else torch.int8)
    if kind in BITS and keys:
        few = min(OUTLIERS, dim)
        outliers, fine = empty(few, dtype=torch.int16), empty((size + 1) // 2, few)
    if not (heads and pages):
        return PageCodes(kind, size, codes, spread, floor, outliers, fine)
    if kind == "fp8":
        _encode_fp8_kernel[grid](tokens, codes, spread, *inputs, **common)
    elif keys:
        _encode_keys_kernel[grid](
            tokens, codes, spread, floor, outliers, fine, *inputs, BITS=BITS[kind], ROWS=rows, FEW=min(OUTLIERS, dim),
            FINE_ROWS=(size + 1) // 2, BLOCK_F=triton.next_power_of_2((size + 1) // 2), **common,
        )  # fmt: skip
    else:
        _encode_values_kernel[grid](tokens, codes, spread, floor, *inputs, BITS=BITS[kind], ROWS=rows, **common)
    return PageCodes(kind, size, codes, spread, floor, outliers, fine)
