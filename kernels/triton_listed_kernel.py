# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""The kernel of the decode step over lists of pages of several pools, in formats of their own."""

import triton
import triton.language as tl

from .triton_page_loop import attend_part

#: Formats, pairs of kinds of keys and of values, that one launch reads at most.
MOST_FORMATS = 8

#: What is in memory of a pool, as int64: where its tensors begin, those of keys and of values in the order of
#: `PageCodes`; pages from one head to the next; the first of the parts that lists are read in that is of its pages, and
#: the one after the last; and which of the formats of its launch is its own.
KEYS, VALUES, KEY_PAGES, VALUE_PAGES, FIRST_PART, LAST_PART, FORMAT, FIELDS = 0, 6, 12, 13, 14, 15, 16, 17

#: The digit that stands for a kind.
KIND_DIGITS = {"none": 0, "int8": 1, "int4": 2, "int2": 3, "fp8": 4}

_CODES: tl.constexpr = tl.constexpr(0)
_SPREAD: tl.constexpr = tl.constexpr(1)
_FLOOR: tl.constexpr = tl.constexpr(2)
_OUTLIERS: tl.constexpr = tl.constexpr(3)
_FINE: tl.constexpr = tl.constexpr(4)
_LATENT: tl.constexpr = tl.constexpr(5)
_VALUES: tl.constexpr = tl.constexpr(VALUES)
_KEY_PAGES: tl.constexpr = tl.constexpr(KEY_PAGES)
_VALUE_PAGES: tl.constexpr = tl.constexpr(VALUE_PAGES)
_FIRST_PART: tl.constexpr = tl.constexpr(FIRST_PART)
_LAST_PART: tl.constexpr = tl.constexpr(LAST_PART)
_FORMAT: tl.constexpr = tl.constexpr(FORMAT)
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


@triton.jit
def _tensor(record, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a tensor of a pool begins."""
    return tl.multiple_of(tl.load(record + FIELD).to(tl.pointer_type(TYPE)), 16 if ALIGNED else 1)


@triton.jit(
    do_not_specialize=["scale", "softcap", "grown", "rows", "pools", "all_parts", "first_part", "parts", "columns"]
)
def listed_kernel(
    query, listed, out, lse, page_lse,
    scale, softcap, grown, rows, pools, all_parts, first_part, parts, columns,
    HEADS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BY_HEAD: tl.constexpr, P: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    FORMATS: tl.constexpr, KEY_KINDS: tl.constexpr, VALUE_KINDS: tl.constexpr,
    D: tl.constexpr, L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    DV: tl.constexpr, LV: tl.constexpr, BLOCK_CV: tl.constexpr, BLOCK_LV: tl.constexpr,
    SOFTCAP: tl.constexpr, PAGE_LSE: tl.constexpr, ASM: tl.constexpr,
    PLAIN_STAGES: tl.constexpr, CODED_STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with up to BLOCK_G query heads of one KV head to one of the parts of a list, which is of one pool.

    `listed` has the records of all `pools`; the pool of each of `all_parts`; where the pages of each list and pool
    begin, list after list, and the end; and the entries. This launch computes `parts` parts, from `first_part` on.
    Their pools have FORMATS formats, the digits (KIND_DIGITS) of KEY_KINDS and VALUE_KINDS, base 8, the first lowest.
    """
    HEAD_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    part = first_part + tl.program_id(0) % parts
    block = tl.program_id(0) // parts
    lane = block // HEAD_BLOCKS
    g = block % HEAD_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    row = lane // HEADS
    head = lane % HEADS
    pool = tl.load(listed + pools * _FIELDS + part).to(tl.int32)
    record = listed + pool * _FIELDS
    starts = listed + pools * _FIELDS + all_parts
    number = head * rows + row if BY_HEAD else row
    lists = HEADS * rows if BY_HEAD else rows
    begin = tl.load(starts + number * pools + pool)
    pages = (tl.load(starts + number * pools + pool + 1) - begin).to(tl.int32)
    before = tl.load(record + _FIRST_PART).to(tl.int32)
    of_pool = tl.load(record + _LAST_PART).to(tl.int32) - before
    share = (pages + of_pool - 1) // of_pool
    first = (part - before) * share
    own = tl.load(record + _FORMAT)
    for this in tl.static_range(FORMATS):
        if own == this:
            KEY_DIGIT: tl.constexpr = (KEY_KINDS >> (3 * this)) & 7
            VALUE_DIGIT: tl.constexpr = (VALUE_KINDS >> (3 * this)) & 7
            KEY_WIDE: tl.constexpr = "none" if KEY_DIGIT == 0 else ("int8" if KEY_DIGIT == 1 else "fp8")
            KEY_KIND: tl.constexpr = "int4" if KEY_DIGIT == 2 else ("int2" if KEY_DIGIT == 3 else KEY_WIDE)
            VALUE_WIDE: tl.constexpr = "none" if VALUE_DIGIT == 0 else ("int8" if VALUE_DIGIT == 1 else "fp8")
            VALUE_KIND: tl.constexpr = "int4" if VALUE_DIGIT == 2 else ("int2" if VALUE_DIGIT == 3 else VALUE_WIDE)
            KEY_TYPE: tl.constexpr = DTYPE if KEY_DIGIT == 0 else tl.int16
            VALUE_TYPE: tl.constexpr = DTYPE if VALUE_DIGIT == 0 else tl.int16
            STAGES: tl.constexpr = PLAIN_STAGES if KEY_DIGIT + VALUE_DIGIT == 0 else CODED_STAGES
            attend_part(
                query, lane.to(tl.int64) * G + g, g < G,
                _tensor(record, _CODES, KEY_TYPE, ALIGNED),
                _tensor(record, _SPREAD, tl.int16, ALIGNED),
                _tensor(record, _FLOOR, tl.int32, ALIGNED),
                _tensor(record, _OUTLIERS, tl.int64, ALIGNED),
                _tensor(record, _FINE, tl.int32, ALIGNED),
                _tensor(record, _LATENT, DTYPE, ALIGNED),
                _tensor(record, _VALUES + _CODES, VALUE_TYPE, ALIGNED),
                _tensor(record, _VALUES + _SPREAD, tl.int16, ALIGNED),
                _tensor(record, _VALUES + _FLOOR, tl.int16, ALIGNED),
                _tensor(record, _VALUES + _LATENT, DTYPE, ALIGNED),
                head * tl.load(record + _KEY_PAGES), head * tl.load(record + _VALUE_PAGES),
                starts + lists * pools + 1 + begin, None, grown, first, tl.minimum(first + share, pages),
                out, lse, page_lse, part.to(tl.int64) * (rows * HEADS * G), columns, scale, softcap,
                BLOCK_G, P, BLOCK_P, KEY_KIND, D, L, BLOCK_C, BLOCK_L, VALUE_KIND, DV, LV, BLOCK_CV, BLOCK_LV,
                SOFTCAP, PAGE_LSE, True, ASM, STAGES,
            )  # fmt: skip
