# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.gather_pages.gather_pages`."""

import torch
import triton
import triton.language as tl

from .page_codes import PageCodes
from .triton_basics import e4m3, float16_bits, high_byte, low_byte, signed, spread_share
from .triton_pool import block_channels, block_tokens, layout, pool_operands, power_of_2


@triton.jit
def _decoded(
    codes, spread, floor, page, t, c, live, KIND: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    LOG_LEVELS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return even and odd channels of a page's tokens t in float32, and what one code of theirs stands for."""
    mask = c < C * live
    words = tl.load(codes + page * (ROWS * C) + (t % ROWS)[:, None] * C + c[None, :], mask=mask[None, :], other=0)
    spreads = tl.load(spread + page * C + c, mask=mask, other=0)
    step0 = spread_share(low_byte(spreads), LOG_LEVELS, False)
    step1 = spread_share(high_byte(spreads), LOG_LEVELS, False)
    if KIND == "fp8":
        even, odd = e4m3(low_byte(words)) * step0[None, :], e4m3(high_byte(words)) * step1[None, :]
    else:
        shift = (t // ROWS % (8 // BITS) * BITS)[:, None]
        even = ((low_byte(words) >> shift) & (2**BITS - 1)).to(tl.float32) * step0[None, :]
        odd = ((high_byte(words) >> shift) & (2**BITS - 1)).to(tl.float32) * step1[None, :]
        floors = tl.load(floor + page * C + c, mask=mask, other=0)
        if KEYS:
            even += float16_bits(floors & 0xFFFF)[None, :]
            odd += float16_bits((floors >> 16) & 0xFFFF)[None, :]
        else:
            UNIT: tl.constexpr = (2**BITS - 1) / 32.0
            even += (signed(low_byte(floors)).to(tl.float32) * UNIT * step0)[None, :]
            odd += (signed(high_byte(floors)).to(tl.float32) * UNIT * step1)[None, :]
    return even, odd, step0, step1


@triton.jit
def _gather_kernel(
    codes, spread, floor, outliers, fine, latent, table, lengths, counts, out, pool_pages, columns,
    HEADS: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, LOG_LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Decode one page of one head to its place, or write zeros there."""
    C: tl.constexpr = (D + 1) // 2
    column = tl.program_id(0) % columns
    lane = tl.program_id(0) // columns
    row = (lane // HEADS).to(tl.int64)
    used = column < tl.load(lengths + row)
    page = tl.load(table + row * columns + column, mask=used, other=0).to(tl.int64)
    count = tl.load(counts + page, mask=used, other=0)
    pool_page = (lane % HEADS).to(tl.int64) * pool_pages + page
    t = tl.arange(0, BLOCK_P)
    held = (t < count)[:, None]
    target = out + ((lane.to(tl.int64) * columns + column) * P + t)[:, None] * (D + L)
    slot = (t < P)[:, None]
    d = tl.arange(0, 2 * BLOCK_C)
    if KIND == "none":
        source = codes + pool_page * (P * D) + t[:, None] * D + d[None, :]
        tokens = tl.load(source, mask=held & (d < D)[None, :], other=0.0)
    else:
        # The page of an entry that is not in use is not there to be read.
        live = (count > 0).to(tl.int32)
        c = tl.arange(0, BLOCK_C)
        even, odd, step0, step1 = _decoded(
            codes, spread, floor, pool_page, t, c, live, KIND, C, ROWS, BITS, LOG_LEVELS, KEYS
        )
        if KEYS and KIND != "fp8":
            FINE_ROWS: tl.constexpr = (P + 1) // 2
            few = tl.load(outliers + pool_page, mask=live > 0, other=0)
            parts = tl.load(fine + pool_page * FINE_ROWS + t % FINE_ROWS, mask=t < P * live, other=0)
            parts = parts >> (t // FINE_ROWS % 2 * 4)
            for j in tl.static_range(4):
                channel = (few >> (16 * j)).to(tl.int32) & 0xFFFF
                share = (((parts >> (8 * j)) & 15).to(tl.float32) + 0.5) * (1.0 / 16.0) - 0.5
                even += tl.where(2 * c == channel, step0, 0.0)[None, :] * share[:, None]
                odd += tl.where(2 * c + 1 == channel, step1, 0.0)[None, :] * share[:, None]
        tokens = tl.where(held, tl.reshape(tl.join(even, odd), (BLOCK_P, 2 * BLOCK_C)), 0.0)
    tl.store(target + d[None, :], tokens.to(out.dtype.element_ty), mask=slot & (d < D)[None, :])
    if L > 0:
        rest = tl.arange(0, BLOCK_L)
        source = latent + pool_page * (P * L) + t[:, None] * L + rest[None, :]
        tail = tl.load(source, mask=held & (rest < L)[None, :], other=0.0)
        tl.store(target + D + rest[None, :], tail.to(out.dtype.element_ty), mask=slot & (rest < L)[None, :])


def gather_pages(
    pages: PageCodes, table: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Launch the kernel; see the public function."""
    batch, columns = table.shape
    keys = pages.floor is None or pages.floor.dtype == torch.float16
    operands = pool_operands(pages, torch.float16 if keys else torch.int8)
    out = pages.codes.new_empty((batch, pages.heads, columns * pages.page_size, pages.width), dtype=dtype)
    programs = batch * pages.heads * columns
    if programs:
        bits, rows, _, log_levels = layout(pages)
        latent = pages.width - pages.dim
        _gather_kernel[(programs,)](
            *operands.tensors, table.contiguous(), lengths.contiguous(), counts.contiguous(), out,
            operands.pages, columns,
            HEADS=pages.heads, KIND=pages.kind, P=pages.page_size, BLOCK_P=block_tokens(pages.page_size),
            D=pages.dim, L=latent, ROWS=rows, BITS=bits, LOG_LEVELS=log_levels, BLOCK_C=block_channels(pages.dim),
            BLOCK_L=max(16, power_of_2(latent)), KEYS=keys,
        )  # fmt: skip
    return out
