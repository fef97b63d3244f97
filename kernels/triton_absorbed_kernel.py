# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The kernel of the decode step of latent attention (MLA): one query per row over pages of latents and rotary keys.

A program takes some query heads, all of which read the same KV head, over a part of a row's pages, a tile of tokens at
a time. Heads are the rows of both products and tokens the columns of the first, so that many heads fill tensor cores. A
tile of latents is read once, for the scores and for the output. Packed tokens are decoded before they are multiplied:
there are more queries than tokens in a tile, so that decoding costs less than multiplying queries and sums by steps.
"""

import triton
import triton.language as tl

from .triton_basics import (
    capped,
    exp2,
    float16_bits,
    high_byte,
    low_byte,
    natural_log,
    row_max,
    row_sum,
    signed,
    spread_share,
)
from .triton_unpack import load_dense, load_vector, outlier_parts, unpack


@triton.jit
def _floor_values(words, step0, step1, FLOOR: tl.constexpr, LEVELS: tl.constexpr):
    """Return the floors of even and odd channels: float16 ones, or int8 ones in units of spread / 32."""
    if FLOOR == "float16":
        floor0, floor1 = float16_bits(words & 0xFFFF), float16_bits((words >> 16) & 0xFFFF)
    else:
        UNIT: tl.constexpr = LEVELS / 32.0
        floor0 = signed(low_byte(words)).to(tl.float32) * (step0 * UNIT)
        floor1 = signed(high_byte(words)).to(tl.float32) * (step1 * UNIT)
    return floor0, floor1


@triton.jit
def _add_outliers(
    even, odd, spread, outliers, fine, page, t, c, D: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    LOG_LEVELS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the further bits of a page's widest channels to decoded tokens, by a product of sixteen columns."""
    FINE_ROWS: tl.constexpr = (P + 1) // 2
    parts = outlier_parts(load_vector(fine, page, t % FINE_ROWS, FINE_ROWS, True), t, FINE_ROWS, dtype)
    j = tl.arange(0, 16)
    used = j < 4
    # A page without tokens may hold any index.
    channel = tl.minimum((tl.load(outliers + page) >> (j % 4 * 16)).to(tl.int32) & 0xFFFF, D - 1)
    words = tl.load(spread + page * C + channel // 2, mask=used, other=0).to(tl.int32)
    step = spread_share((words >> (channel % 2 * 8)) & 0xFF, LOG_LEVELS, ASM)[:, None]
    mine = used[:, None] & ((channel // 2)[:, None] == c[None, :])
    is_odd = (channel % 2 == 1)[:, None]
    even = tl.dot(parts, tl.where(mine & ~is_odd, step, 0.0).to(dtype), even, input_precision="ieee")
    odd = tl.dot(parts, tl.where(mine & is_odd, step, 0.0).to(dtype), odd, input_precision="ieee")
    return even, odd


@triton.jit
def _stored(
    codes, page, t, count, c, first, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SEVERAL: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Load channels `first + c` of tokens that are stored as they are, of one page or, if SEVERAL, of a page each."""
    if SEVERAL:
        tokens = load_dense(
            codes + (page * (P * D))[:, None], first, count[:, None], t[:, None], c[None, :], D, C, dtype
        )
    else:
        tokens = load_dense(codes + page * (P * D), first, count, t[:, None], c[None, :], D, C, dtype)
    return tokens


@triton.jit
def _decoded(
    codes, spread, floor, outliers, fine, page, t, count, c, KIND: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, LOG_LEVELS: tl.constexpr, CENTRE: tl.constexpr, FLOOR: tl.constexpr,
    OUTLIERS: tl.constexpr, SEVERAL: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Read tokens t of a page, `(tokens, BLOCK_C)` each: even and odd channels, or two halves if stored as they are."""
    C: tl.constexpr = (D + 1) // 2
    if KIND == "none":
        even = _stored(codes, page, t, count, c, 0, C, D, P, SEVERAL, dtype)
        odd = _stored(codes, page, t, count, c, C, C, D, P, SEVERAL, dtype)
    else:
        words = tl.load(codes + page * (ROWS * C) + (t % ROWS * C)[:, None] + c[None, :], mask=c[None, :] < C, other=0)
        spreads = load_vector(spread, page, c, C, True)
        floors = load_vector(floor, page, c, C, FLOOR != "none")
        if BITS < 8:
            # A byte is read once for each token that it holds.
            words = words >> (t // ROWS % (8 // BITS) * BITS)[:, None].to(tl.int16)
        even, odd = unpack(words, 0, KIND, CENTRE, dtype, ASM)
        step0 = spread_share(low_byte(spreads), LOG_LEVELS, ASM)
        step1 = spread_share(high_byte(spreads), LOG_LEVELS, ASM)
        NARROW: tl.constexpr = (KIND == "int4" or KIND == "int2") and dtype == tl.bfloat16
        # What `unpack` has subtracted from the codes.
        LESS: tl.constexpr = -128 if ASM and NARROW else CENTRE
        base0, base1 = step0 * LESS, step1 * LESS
        if FLOOR != "none":
            floor0, floor1 = _floor_values(floors, step0, step1, FLOOR, 2**BITS - 1)
            # A page without tokens may hold any floor, and a weight of 0 would not hide NaN.
            base0 += tl.where(count > 0, floor0, 0.0)
            base1 += tl.where(count > 0, floor1, 0.0)
        even = even.to(tl.float32) * step0[None, :] + base0[None, :]
        odd = odd.to(tl.float32) * step1[None, :] + base1[None, :]
        if OUTLIERS:
            even, odd = _add_outliers(even, odd, spread, outliers, fine, page, t, c, D, C, P, LOG_LEVELS, dtype, ASM)
        even, odd = even.to(dtype), odd.to(dtype)
    return even, odd


@triton.jit
def _load_query(heads, h_mask, c, KIND: tl.constexpr, D: tl.constexpr):
    """Load the channels of queries that meet those of :func:`_decoded`."""
    STRIDE: tl.constexpr = 1 if KIND == "none" else 2
    OTHER: tl.constexpr = (D + 1) // 2 if KIND == "none" else 1
    mask = h_mask[:, None] & (c < (D + 1) // 2)[None, :]
    even = tl.load(heads[:, None] + (c * STRIDE)[None, :], mask=mask, other=0.0)
    odd_mask = mask & (c * STRIDE + OTHER < D)[None, :]
    return even, tl.load(heads[:, None] + (c * STRIDE + OTHER)[None, :], mask=odd_mask, other=0.0)


@triton.jit(do_not_specialize=["scale", "softcap", "latent_pages", "rotary_pages", "columns", "splits"])
def absorbed_kernel(
    query, latent_codes, latent_spread, latent_floor, latent_outliers, latent_fine, latent_rest,
    rotary_codes, rotary_spread, rotary_floor, rotary_outliers, rotary_fine, rotary_rest,
    table, lengths, counts, out, lse, tile_lse,
    scale, softcap, latent_pages, rotary_pages, columns, splits,
    HEADS: tl.constexpr, G: tl.constexpr, BLOCK_H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LATENT_KIND: tl.constexpr, R: tl.constexpr, L: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_BITS: tl.constexpr,
    LATENT_LOG_LEVELS: tl.constexpr, LATENT_CENTRE: tl.constexpr, LATENT_FLOOR: tl.constexpr,
    LATENT_OUTLIERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    ROTARY_KIND: tl.constexpr, DR: tl.constexpr, LR: tl.constexpr, ROTARY_ROWS: tl.constexpr, ROTARY_BITS: tl.constexpr,
    ROTARY_LOG_LEVELS: tl.constexpr, ROTARY_CENTRE: tl.constexpr, ROTARY_FLOOR: tl.constexpr,
    ROTARY_OUTLIERS: tl.constexpr, BLOCK_CR: tl.constexpr, BLOCK_LR: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE_LSE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with up to BLOCK_H query heads of one KV head to one of `splits` parts of a row's pages."""
    HEAD_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    # Pages that are shorter than a tile, none of them packed.
    SEVERAL: tl.constexpr = BLOCK_N > BLOCK_P
    split = tl.program_id(0) // HEAD_BLOCKS % splits
    lane = tl.program_id(0) // HEAD_BLOCKS // splits
    # Programs that read the same pages run side by side, so that all but one find them in the L2 cache.
    g = tl.program_id(0) % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = g < G
    query_head = lane.to(tl.int64) * G + g
    row = lane // HEADS
    latent_base = (lane % HEADS).to(tl.int64) * latent_pages
    rotary_base = (lane % HEADS).to(tl.int64) * rotary_pages
    pages = tl.load(lengths + row)
    share = (pages + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, pages)
    table += row.to(tl.int64) * columns

    c = tl.arange(0, BLOCK_C)
    cr = tl.arange(0, BLOCK_CR)
    heads = query + query_head * (R + L + DR + LR)
    q0, q1 = _load_query(heads, h_mask, c, LATENT_KIND, R)
    r0, r1 = _load_query(heads + (R + L), h_mask, cr, ROTARY_KIND, DR)
    dtype = q0.dtype
    if L > 0:
        l_index = tl.arange(0, BLOCK_L)
        rest_mask = h_mask[:, None] & (l_index < L)[None, :]
        rest_query = tl.load(heads[:, None] + R + l_index[None, :], mask=rest_mask, other=0.0)
        rest_sum = tl.full((BLOCK_H, BLOCK_L), 0.0, tl.float32)
    if LR > 0:
        lr_index = tl.arange(0, BLOCK_LR)
        lr_mask = h_mask[:, None] & (lr_index < LR)[None, :]
        rotary_query = tl.load(heads[:, None] + (R + L + DR) + lr_index[None, :], mask=lr_mask, other=0.0)

    # Finite, so that a tile without visible tokens leaves exp2(-inf - peak) = 0 and not NaN.
    peak = tl.full((BLOCK_H,), -1.0e38, tl.float32)
    total = tl.full((BLOCK_H,), 0.0, tl.float32)
    sum0 = tl.full((BLOCK_H, BLOCK_C), 0.0, tl.float32)
    sum1 = tl.full((BLOCK_H, BLOCK_C), 0.0, tl.float32)

    for i in tl.range(0, ((last - first) * BLOCK_P + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        slot = first * BLOCK_P + i * BLOCK_N
        if SEVERAL:
            column = (slot + tl.arange(0, BLOCK_N)) // BLOCK_P
            page = tl.load(table + column, mask=column < last, other=0).to(tl.int64)
            count = tl.load(counts + page, mask=column < last, other=0)
            t = tl.arange(0, BLOCK_N) % BLOCK_P
        else:
            page = tl.load(table + slot // BLOCK_P).to(tl.int64)
            count = tl.load(counts + page)
            t = slot % BLOCK_P + tl.arange(0, BLOCK_N)
        latent_page = latent_base + page
        rotary_page = rotary_base + page
        k0, k1 = _decoded(
            latent_codes, latent_spread, latent_floor, latent_outliers, latent_fine, latent_page, t, count, c,
            LATENT_KIND, R, P, LATENT_ROWS, LATENT_BITS, LATENT_LOG_LEVELS, LATENT_CENTRE, LATENT_FLOOR,
            LATENT_OUTLIERS, SEVERAL, dtype, ASM,
        )  # fmt: skip
        p0, p1 = _decoded(
            rotary_codes, rotary_spread, rotary_floor, rotary_outliers, rotary_fine, rotary_page, t, count, cr,
            ROTARY_KIND, DR, P, ROTARY_ROWS, ROTARY_BITS, ROTARY_LOG_LEVELS, ROTARY_CENTRE, ROTARY_FLOOR,
            ROTARY_OUTLIERS, SEVERAL, dtype, ASM,
        )  # fmt: skip
        logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee")
        logits = tl.dot(r0, tl.trans(p0), logits, input_precision="ieee")
        logits = tl.dot(r1, tl.trans(p1), logits, input_precision="ieee")
        if L > 0:
            rest = _stored(latent_rest, latent_page, t, count, l_index, 0, L, L, P, SEVERAL, dtype)
            logits = tl.dot(rest_query, tl.trans(rest), logits, input_precision="ieee")
        if LR > 0:
            more = _stored(rotary_rest, rotary_page, t, count, lr_index, 0, LR, LR, P, SEVERAL, dtype)
            logits = tl.dot(rotary_query, tl.trans(more), logits, input_precision="ieee")
        logits = capped(logits, scale, softcap, SOFTCAP, ASM)
        logits = tl.where((t < count)[None, :], logits, float("-inf"))

        tile_peak = row_max(logits, 1)
        if PAGE_LSE:
            base = tl.maximum(tile_peak, -1.0e38)
            mass = row_sum(exp2(logits - base[:, None], ASM), 1)
            tl.store(
                tile_lse + query_head * (columns * BLOCK_P // BLOCK_N) + slot // BLOCK_N,
                natural_log(base, mass),
                mask=h_mask,
            )
        new_peak = tl.maximum(peak, tile_peak)
        weights = exp2(logits - new_peak[:, None], ASM)
        decay = exp2(peak - new_peak, ASM)
        total = total * decay + row_sum(weights, 1)
        peak = new_peak
        weights = weights.to(dtype)
        sum0 = tl.dot(weights, k0, sum0 * decay[:, None], input_precision="ieee")
        sum1 = tl.dot(weights, k1, sum1 * decay[:, None], input_precision="ieee")
        if L > 0:
            rest_sum = tl.dot(weights, rest, rest_sum * decay[:, None], input_precision="ieee")

    STRIDE: tl.constexpr = 1 if LATENT_KIND == "none" else 2
    OTHER: tl.constexpr = (R + 1) // 2 if LATENT_KIND == "none" else 1
    share_of = (1.0 / tl.maximum(total, 1.0e-37))[:, None]
    rows = tl.num_programs(0) // HEAD_BLOCKS // splits * G
    index = split.to(tl.int64) * rows + query_head
    target = (out + index * (R + L))[:, None]
    channel = (c * STRIDE)[None, :]
    mask = h_mask[:, None] & (c < (R + 1) // 2)[None, :]
    tl.store(target + channel, sum0 * share_of, mask=mask)
    tl.store(target + channel + OTHER, sum1 * share_of, mask=mask & (channel + OTHER < R))
    if L > 0:
        tl.store(target + R + l_index[None, :], rest_sum * share_of, mask=rest_mask)
    tl.store(lse + index, natural_log(peak, total), mask=h_mask)
