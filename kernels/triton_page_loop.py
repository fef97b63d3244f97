# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The loop of the decode step: one query per row over packed pages, decoded in registers.

A program takes the query heads of one KV head over a part of a row's pages, one page at a time. The page's tokens are
the rows of both products (keys times queries, and values transposed times weights), the query heads their columns, so
that eight columns are enough for up to eight heads. A page's steps multiply the query and the sums, which are smaller
than the page, and never its codes.
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
from .triton_unpack import key_products, load_dense, load_vector, load_words, outlier_parts, value_sums

# Logarithms of base 2 of the largest float8 and of the levels of int8, int4 and int2.
_LOG_FP8: tl.constexpr = tl.constexpr(8.807354922057604)
_LOG_INT8: tl.constexpr = tl.constexpr(7.994353436858858)
_LOG_INT4: tl.constexpr = tl.constexpr(3.906890595608519)
_LOG_INT2: tl.constexpr = tl.constexpr(1.584962500721156)


@triton.jit
def _outlier_weights(outliers, spread, query, g_mask, C: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr):
    """Return the query times a sixteenth of the spreads of a page's finer channels, `(16, BLOCK_G)`.

    Sixteen rows, because tensor cores sum over no fewer; all but four are 0.
    """
    j = tl.arange(0, 16)
    used = j < 4
    # A page without tokens may hold any index.
    channel = tl.minimum((outliers >> (j % 4 * 16)).to(tl.int32) & 0xFFFF, D - 1)
    words = tl.load(spread + channel // 2, mask=used, other=0).to(tl.int32)
    step = spread_share((words >> (channel % 2 * 8)) & 0xFF, 4.0, ASM)
    few = tl.load(query[None, :] + channel[:, None], mask=used[:, None] & g_mask[None, :], other=0.0)
    return (few.to(tl.float32) * step[:, None]).to(few.dtype)


@triton.jit
def _page_and_count(entry, counts, grown, LISTED: tl.constexpr):
    """Return the page (int64) and its tokens (int32) that an entry stands for.

    If LISTED it is `grows << 48 | tokens << 32 | page`, and a page that grows has `grown` more tokens than it says.
    """
    if LISTED:
        word = tl.load(entry)
        page = word & 0x7FFFFFFF
        count = ((word >> 32) & 0xFFFF).to(tl.int32) + (word >> 48).to(tl.int32) * grown
    else:
        page = tl.load(entry).to(tl.int64)
        count = tl.load(counts + page)
    return page, count


@triton.jit
def attend_part(
    query, query_head, g_mask,
    key_codes, key_spread, key_floor, key_outliers, key_fine, key_latent,
    value_codes, value_spread, value_floor, value_latent, key_base, value_base,
    entries, counts, grown, first, last, out, lse, page_lse, partial, columns, scale, softcap,
    BLOCK_G: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    KEY_KIND: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    VALUE_KIND: tl.constexpr, DV: tl.constexpr, LV: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_LV: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE_LSE: tl.constexpr, LISTED: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with some query heads of one KV head to the pages `first..last-1` of a list, in one pool.

    Entries are page numbers, whose tokens `counts` has, or say both if LISTED; see :func:`_page_and_count`. The result
    goes to `out` and `lse` behind `partial` results of other query heads and parts.
    """
    C: tl.constexpr = (D + 1) // 2
    CV: tl.constexpr = (DV + 1) // 2
    KEY_BITS: tl.constexpr = 2 if KEY_KIND == "int2" else (4 if KEY_KIND == "int4" else 8)
    VALUE_BITS: tl.constexpr = 2 if VALUE_KIND == "int2" else (4 if VALUE_KIND == "int4" else 8)
    # Rows of codes; those that are multiplied at once are 16 at least, and all tokens of a page that needs padding.
    KEY_ROWS: tl.constexpr = (P * KEY_BITS + 7) // 8
    VALUE_ROWS: tl.constexpr = (P * VALUE_BITS + 7) // 8
    KEY_TILE: tl.constexpr = BLOCK_P if BLOCK_P != P else (KEY_ROWS if KEY_ROWS > 16 else 16)
    VALUE_TILE: tl.constexpr = BLOCK_P if BLOCK_P != P else (VALUE_ROWS if VALUE_ROWS > 16 else 16)
    # Subtracted from codes, so that the rounding of what multiplies them is that of the decoded tokens.
    KEY_CENTRE: tl.constexpr = 128 if KEY_KIND == "int8" else (0 if KEY_BITS == 8 else 2 ** (KEY_BITS - 1))
    VALUE_CENTRE: tl.constexpr = 128 if VALUE_KIND == "int8" else (0 if VALUE_BITS == 8 else 2 ** (VALUE_BITS - 1))
    KEY_SCALE: tl.constexpr = 16.0 / (448.0 if KEY_KIND == "fp8" else 2.0**KEY_BITS - 1.0)
    VALUE_LOG_LEVELS: tl.constexpr = (
        _LOG_FP8
        if VALUE_KIND == "fp8"
        else (_LOG_INT8 if VALUE_BITS == 8 else (_LOG_INT4 if VALUE_BITS == 4 else _LOG_INT2))
    )
    KEY_CODED: tl.constexpr = KEY_KIND != "none"
    VALUE_CODED: tl.constexpr = VALUE_KIND != "none"
    KEY_FLOOR: tl.constexpr = KEY_CODED and KEY_KIND != "fp8"
    VALUE_FLOOR: tl.constexpr = VALUE_CODED and VALUE_KIND != "fp8"
    OUTLIERS: tl.constexpr = KEY_FLOOR
    FINE_ROWS: tl.constexpr = (P + 1) // 2

    t = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    cv = tl.arange(0, BLOCK_CV)
    # Codes of neighbouring channels share a word; what is stored as it is is read in two halves.
    KEY_STRIDE: tl.constexpr = 1 if KEY_KIND == "none" else 2
    KEY_OTHER: tl.constexpr = C if KEY_KIND == "none" else 1
    query_mask = g_mask[:, None] & (c[None, :] < C)
    heads = query + query_head * (D + L)
    q0 = tl.load(heads[:, None] + c[None, :] * KEY_STRIDE, mask=query_mask, other=0.0)
    q1_mask = query_mask & (c[None, :] * KEY_STRIDE + KEY_OTHER < D)
    q1 = tl.load(heads[:, None] + c[None, :] * KEY_STRIDE + KEY_OTHER, mask=q1_mask, other=0.0)
    dtype = q0.dtype
    if L > 0:
        l_index = tl.arange(0, BLOCK_L)
        latent_mask = g_mask[:, None] & (l_index[None, :] < L)
        latent_query = tl.load(heads[:, None] + D + l_index[None, :], mask=latent_mask, other=0.0)
    if LV > 0:
        lv_index = tl.arange(0, BLOCK_LV)
        latent_sum = tl.full((BLOCK_LV, BLOCK_G), 0.0, tl.float32)

    # Finite, so that a page without visible tokens leaves exp2(-inf - peak) = 0 and not NaN.
    peak = tl.full((BLOCK_G,), -1.0e38, tl.float32)
    total = tl.full((BLOCK_G,), 0.0, tl.float32)
    sum0 = tl.full((BLOCK_CV, BLOCK_G), 0.0, tl.float32)
    sum1 = tl.full((BLOCK_CV, BLOCK_G), 0.0, tl.float32)

    for i in tl.range(first, last, num_stages=STAGES):
        page, count = _page_and_count(entries + i, counts, grown, LISTED)
        key_page = key_base + page
        value_page = value_base + page
        key_spreads = load_vector(key_spread, key_page, c, C, KEY_CODED)
        key_floors = load_vector(key_floor, key_page, c, C, KEY_FLOOR)
        value_spreads = load_vector(value_spread, value_page, cv, CV, VALUE_CODED)
        value_floors = load_vector(value_floor, value_page, cv, CV, VALUE_FLOOR)
        fine = load_vector(key_fine, key_page, t % FINE_ROWS, FINE_ROWS, OUTLIERS)
        outliers = tl.load(key_outliers + key_page) if OUTLIERS else 0
        if KEY_KIND == "none":
            keys = key_codes + key_page * (P * D)
            k0 = load_dense(keys, 0, count, t[:, None], c[None, :], D, C, dtype)
            k1 = load_dense(keys, C, count, t[:, None], c[None, :], D, C, dtype)
        else:
            keys = key_codes + key_page * (KEY_ROWS * C)
            key_words = load_words(keys, tl.arange(0, KEY_TILE)[:, None], c[None, :], KEY_ROWS, C, KEY_BITS)
        if VALUE_KIND == "none":
            values = value_codes + value_page * (P * DV)
            v0 = load_dense(values, 0, count, t[None, :], cv[:, None], DV, CV, dtype)
            v1 = load_dense(values, CV, count, t[None, :], cv[:, None], DV, CV, dtype)
        else:
            values = value_codes + value_page * (VALUE_ROWS * CV)
            value_t = tl.arange(0, VALUE_TILE)[None, :]
            value_words = load_words(values, value_t, cv[:, None], VALUE_ROWS, CV, VALUE_BITS)
        if L > 0:
            key_rest = load_dense(key_latent + key_page * (P * L), 0, P, t[:, None], l_index[None, :], L, L, dtype)
        if LV > 0:
            latents = value_latent + value_page * (P * LV)
            value_rest = load_dense(latents, 0, count, t[None, :], lv_index[:, None], LV, LV, dtype)

        if OUTLIERS:
            outlier_weights = _outlier_weights(outliers, key_spread + key_page * C, heads, g_mask, C, D, ASM)
        if KEY_CODED:
            # Sixteenths, whose products with a query a float16 holds where it held those with the keys; the rest of
            # the step multiplies the logits.
            step0 = spread_share(low_byte(key_spreads), 4.0, ASM)
            step1 = spread_share(high_byte(key_spreads), 4.0, ASM)
            scaled0 = tl.trans((q0.to(tl.float32) * step0[None, :]).to(dtype))
            scaled1 = tl.trans((q1.to(tl.float32) * step1[None, :]).to(dtype))
            logits = key_products(
                key_words, scaled0, scaled1, BLOCK_P // KEY_TILE, KEY_BITS * (KEY_TILE // KEY_ROWS), KEY_KIND,
                KEY_CENTRE, ASM,
            )  # fmt: skip
            if OUTLIERS:
                parts = outlier_parts(fine, t, FINE_ROWS, dtype)
                logits = tl.dot(parts, outlier_weights, logits, input_precision="ieee")
            logits *= KEY_SCALE
            if KEY_FLOOR:
                floor0 = float16_bits(key_floors & 0xFFFF)
                floor1 = float16_bits((key_floors >> 16) & 0xFFFF)
                level = q0.to(tl.float32) * (floor0 + KEY_CENTRE * KEY_SCALE * step0)[None, :]
                level += q1.to(tl.float32) * (floor1 + KEY_CENTRE * KEY_SCALE * step1)[None, :]
                logits += row_sum(level, 1)[None, :]
        else:
            logits = tl.dot(k0, tl.trans(q0), input_precision="ieee")
            logits = tl.dot(k1, tl.trans(q1), logits, input_precision="ieee")
        if L > 0:
            logits = tl.dot(key_rest, tl.trans(latent_query), logits, input_precision="ieee")
        logits = capped(logits, scale, softcap, SOFTCAP, ASM)
        logits = tl.where((t < count)[:, None], logits, float("-inf"))

        page_peak = row_max(logits, 0)
        if PAGE_LSE:
            base = tl.maximum(page_peak, -1.0e38)
            mass = row_sum(exp2(logits - base[None, :], ASM), 0)
            tl.store(page_lse + query_head * columns + i, natural_log(base, mass), mask=g_mask)
        new_peak = tl.maximum(peak, page_peak)
        weights = exp2(logits - new_peak[None, :], ASM)
        decay = exp2(peak - new_peak, ASM)
        page_total = row_sum(weights, 0)
        total = total * decay + page_total
        peak = new_peak
        weights = weights.to(dtype)

        if VALUE_CODED:
            part0, part1 = value_sums(
                value_words, weights, BLOCK_P // VALUE_TILE, VALUE_BITS * (VALUE_TILE // VALUE_ROWS),
                VALUE_KIND, VALUE_CENTRE, ASM,
            )  # fmt: skip
            step0 = spread_share(low_byte(value_spreads), VALUE_LOG_LEVELS, ASM)
            step1 = spread_share(high_byte(value_spreads), VALUE_LOG_LEVELS, ASM)
            sum0 = sum0 * decay[None, :] + part0 * step0[:, None]
            sum1 = sum1 * decay[None, :] + part1 * step1[:, None]
            if VALUE_FLOOR:
                # Floors count in units of spread / 32.
                UNIT: tl.constexpr = (2**VALUE_BITS - 1) / 32.0
                level0 = (signed(low_byte(value_floors)).to(tl.float32) * UNIT + VALUE_CENTRE) * step0
                level1 = (signed(high_byte(value_floors)).to(tl.float32) * UNIT + VALUE_CENTRE) * step1
                sum0 += level0[:, None] * page_total[None, :]
                sum1 += level1[:, None] * page_total[None, :]
        else:
            sum0 = tl.dot(v0, weights, sum0 * decay[None, :], input_precision="ieee")
            sum1 = tl.dot(v1, weights, sum1 * decay[None, :], input_precision="ieee")
        if LV > 0:
            latent_sum = tl.dot(value_rest, weights, latent_sum * decay[None, :], input_precision="ieee")

    VALUE_STRIDE: tl.constexpr = 1 if VALUE_KIND == "none" else 2
    VALUE_OTHER: tl.constexpr = CV if VALUE_KIND == "none" else 1
    share_of = (1.0 / tl.maximum(total, 1.0e-37))[None, :]
    index = partial + query_head
    target = (out + index * (DV + LV))[None, :]
    channel = (cv * VALUE_STRIDE)[:, None]
    mask = g_mask[None, :] & (cv < CV)[:, None]
    tl.store(target + channel, sum0 * share_of, mask=mask)
    tl.store(target + channel + VALUE_OTHER, sum1 * share_of, mask=mask & (channel + VALUE_OTHER < DV))
    if LV > 0:
        tl.store(
            target + DV + lv_index[:, None], latent_sum * share_of, mask=g_mask[None, :] & (lv_index < LV)[:, None]
        )
    tl.store(lse + index, natural_log(peak, total), mask=g_mask)
