# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The kernel of the decode step over a table of pages of one pool."""

import triton
import triton.language as tl

from .triton_page_loop import attend_part


@triton.jit(do_not_specialize=["scale", "softcap", "key_pages", "value_pages", "columns", "splits"])
def decode_kernel(
    query, key_codes, key_spread, key_floor, key_outliers, key_fine, key_latent,
    value_codes, value_spread, value_floor, value_latent,
    table, lengths, counts, out, lse, page_lse,
    scale, softcap, key_pages, value_pages, columns, splits,
    HEADS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    KEY_KIND: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    VALUE_KIND: tl.constexpr, DV: tl.constexpr, LV: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_LV: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE_LSE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with up to BLOCK_G query heads of one KV head to one of `splits` parts of a row's pages."""
    HEAD_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    lane = block // HEAD_BLOCKS
    g = block % HEAD_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    row = lane // HEADS
    head = (lane % HEADS).to(tl.int64)
    pages = tl.load(lengths + row)
    share = (pages + splits - 1) // splits
    first = split * share
    partial = split.to(tl.int64) * (tl.num_programs(0) // splits // HEAD_BLOCKS) * G
    attend_part(
        query, lane.to(tl.int64) * G + g, g < G,
        key_codes, key_spread, key_floor, key_outliers, key_fine, key_latent,
        value_codes, value_spread, value_floor, value_latent, head * key_pages, head * value_pages,
        table + row.to(tl.int64) * columns, counts, 0, first, tl.minimum(first + share, pages),
        out, lse, page_lse, partial, columns, scale, softcap,
        BLOCK_G, P, BLOCK_P, KEY_KIND, D, L, BLOCK_C, BLOCK_L, VALUE_KIND, DV, LV, BLOCK_CV, BLOCK_LV,
        SOFTCAP, PAGE_LSE, False, ASM, STAGES,
    )  # fmt: skip
