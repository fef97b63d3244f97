"""Attention of a decoding step on a CPU, compiled by numba: lists of pages of any formats, read in one pass.

A task is a part of the pages of one list. Threads take tasks until none is left, and who finishes the last of them
merges what all have found. All queries of a KV head meet its pages one by one.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, int64, njit

from . import numba_tiles
from .decode_layout import (
    CODES,
    COUNTS,
    DONE,
    ENTRIES,
    FLOATS,
    GROUP,
    HEAD_LISTS,
    HEADS,
    LSE,
    NEXT,
    OUT,
    PAGE_LSE,
    PAGE_SIZE,
    PAGE_STRIDE,
    PART_FIELDS,
    PARTIALS,
    POOL_FIELDS,
    POOLS,
    QUERY,
    QUERY_DIM,
    ROW_LISTS,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    SPLITS,
    STARTS,
    TASKS,
    THREADS,
    VALUE_DIM,
)
from .numba_compiler import address_of, sources
from .numba_decode_rows import BLOCK, at, part_at
from .numba_page_products import VECTOR_BYTES, fetch, in_bytes, named, products_with, sums_of
from .numba_tiles import TOKENS, WIDTHS
from .numba_vectors import (
    LANES,
    add,
    count_up,
    div,
    exp,
    fma,
    larger,
    load,
    mul,
    or_nan,
    read_float,
    read_int16,
    splat,
    store,
    sub,
    write_float,
)

# No logit is less, and differences to it are no NaN.
_LEAST = -float(np.finfo(np.float32).max)


def partial_bytes(width: int, value_dim: int) -> int:
    """Return the bytes of what a task has found for a vector of queries: their sums, largest logits and totals."""
    return 4 * (LANES // width) * value_dim + 2 * VECTOR_BYTES


def scratch_bytes(query_dim: int, value_dim: int, page_size: int) -> int:
    """Return the bytes that a thread works in."""
    # Queries and what meets outliers; the logits of a page, of a byte's tokens at least, and of a tile more; scales.
    vectors = query_dim + 4 + page_size + TOKENS + 1
    most = max(query_dim, value_dim)
    return VECTOR_BYTES * vectors + 8 * most + 4 * BLOCK * (most + LANES)


@njit
def _capped(value, cap):  # type: ignore[no-untyped-def]
    """Return `cap * tanh(value / cap)`, as `1 - 2 / (e ** 2x + 1)`, where e ** 2x is neither lost nor too large."""
    twice, most = mul(value, splat(float32(2) / cap)), splat(float32(-80))
    twice = sub(splat(float32(0)), larger(most, sub(splat(float32(0)), larger(most, twice))))
    tanh = sub(splat(float32(1)), div(splat(float32(2)), add(exp(twice), splat(float32(1)))))
    return or_nan(mul(splat(cap), tanh), value)


def _attention(width: int) -> Any:
    """Return the function that attends to a part of a list with as many queries as a vector of `width` channels has."""
    products_of, add_page, few = products_with(width), sums_of(width), LANES // width
    largest, summed = numba_tiles.largest[width], numba_tiles.summed[width]

    @njit
    @named(f"lay_out_{width}")
    def lay_out(query, count, dim, scale, queries):  # type: ignore[no-untyped-def]
        """Write the queries as vectors, scaled; those that there are not are 0."""
        for step in range(dim // width):
            for lane in range(LANES):
                number, channel = lane // width, step * width + lane % width
                value = read_float(query + 4 * (number * dim + channel)) * scale if number < count else float32(0)
                write_float(queries + VECTOR_BYTES * step + 4 * lane, value)

    @njit
    @named(f"attend_{width}")
    def attend(call, scratch, row, head, split, first_query, out):  # type: ignore[no-untyped-def]
        group, dim, value_dim, size = at(call, GROUP), at(call, QUERY_DIM), at(call, VALUE_DIM), at(call, PAGE_SIZE)
        scale, cap = read_float(call + 8 * FLOATS), read_float(call + 8 * FLOATS + 4)
        steps, count = dim // width, min(few, group - first_query)
        queries = scratch
        logits = queries + VECTOR_BYTES * (steps + 4)
        scales = logits + VECTOR_BYTES * (size + TOKENS)
        of_channels = scales + VECTOR_BYTES
        rows = of_channels + 8 * max(dim, value_dim)
        query = (row * at(call, HEADS) + head) * group + first_query
        lay_out(at(call, QUERY) + 4 * query * dim, count, dim, scale, queries)
        for place_of in range(0, 4 * few * value_dim, VECTOR_BYTES):
            store(out + place_of, splat(float32(0)))
        peak, total = splat(float32(_LEAST)), splat(float32(0))
        starts = at(call, STARTS) + 8 * (row * at(call, ROW_LISTS) + head * at(call, HEAD_LISTS))
        start = at(starts, 0)
        entries, splits = at(starts, 1) - start, at(call, SPLITS)
        last = entries * (split + 1) // splits
        for number in range(entries * split // splits, last):
            entry = at(at(call, ENTRIES), start + number)
            if entry < 0:
                continue
            page = entry & 0xFFFFFFFF
            keys = at(call, POOLS) + (entry >> 32) * (8 * POOL_FIELDS)
            values = keys + 8 * PART_FIELDS
            stored = int64(read_int16(at(keys, COUNTS) + 2 * page))
            if not stored:
                continue
            products_of(keys, values, head, page, stored, size, queries, rows, of_channels, logits)
            end = 4 * few * stored
            if cap > 0:
                for offset in range(0, end, VECTOR_BYTES):
                    store(logits + offset, _capped(load(logits + offset), cap))
            full = (end + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
            for offset in range(end, full, 4):
                write_float(logits + offset, float32(-np.inf))
            best = peak
            for offset in range(0, full, VECTOR_BYTES):
                best = larger(best, load(logits + offset))
            best = largest(best)
            lessened, masses = exp(sub(peak, best)), splat(float32(0))
            store(scales, lessened)
            for offset in range(0, full, VECTOR_BYTES):
                mass = exp(sub(load(logits + offset), best))
                store(logits + offset, mass)
                masses = add(masses, mass)
            peak, total = best, fma(total, lessened, masses)
            ahead = scratch
            if number + 1 < last:
                entry = at(at(call, ENTRIES), start + number + 1)
                if entry >= 0:
                    coming, page_after = at(call, POOLS) + (entry >> 32) * (8 * POOL_FIELDS), entry & 0xFFFFFFFF
                    if in_bytes(coming) and in_bytes(values):
                        ahead = part_at(coming, CODES, head, page_after)
                    else:
                        fetch(coming, head, page_after, 0, min(size, BLOCK), size)
            add_page(values, head, page, stored, size, count, logits, scales, rows, of_channels, out, ahead)
            if at(call, PAGE_LSE):
                store(scales, best)
                store(logits, summed(masses))
                for one in range(count):
                    mass = read_float(logits + 4 * one)
                    if mass != 0:
                        where = 4 * ((query + one) * at(call, PAGE_STRIDE) + number)
                        write_float(at(call, PAGE_LSE) + where, np.log(mass) + read_float(scales + 4 * one))
        store(out + 4 * few * value_dim, peak)
        store(out + 4 * few * value_dim + VECTOR_BYTES, summed(total))

    return attend


@njit
def _merge(call, width):  # type: ignore[no-untyped-def]
    """Write outputs and LSEs of all queries, out of what the parts of their lists have come to."""
    group, splits, dim = at(call, GROUP), at(call, SPLITS), at(call, VALUE_DIM)
    few = LANES // width
    tiles, size = (group + few - 1) // few, 4 * few * dim + 2 * VECTOR_BYTES
    for query in range(at(call, ROWS) * at(call, HEADS) * group):
        head, lane = query // group, query % group % few
        first = at(call, PARTIALS) + (head * splits * tiles + query % group // few) * size
        peak, total = float32(_LEAST), float32(0)
        for split in range(splits):
            peak = max(peak, read_float(first + split * tiles * size + 4 * (few * dim + lane)))
        out = at(call, OUT) + 4 * query * dim
        for channel in range(0, dim, LANES):
            store(out + 4 * channel, splat(float32(0)))
        for split in range(splits):
            part = first + split * tiles * size
            known = part + 4 * (few * dim + lane)
            share = float32(np.exp(read_float(known) - peak))
            total += share * read_float(known + VECTOR_BYTES)
            for channel in range(0, dim, LANES):
                where = out + 4 * channel
                store(where, fma(splat(share), load(part + 4 * (lane * dim + channel)), load(where)))
        # The logarithm of no mass is -inf.
        write_float(at(call, LSE) + 4 * query, float32(peak + np.log(total)))
        share = float32(1) / total if total > 0 else float32(0)
        for channel in range(0, dim, LANES):
            store(out + 4 * channel, mul(splat(share), load(out + 4 * channel)))


def _work(width: int) -> Any:
    """Return the function that takes tasks until none is left."""
    attend, few = _attention(width), LANES // width

    @njit
    @named(f"work_{width}")
    def work(call):  # type: ignore[no-untyped-def]
        scratch = at(call, SCRATCH) + count_up(call + 8 * THREADS) * at(call, SCRATCH_BYTES)
        splits, tasks = at(call, SPLITS), at(call, TASKS)
        tiles = (at(call, GROUP) + few - 1) // few
        size = 4 * few * at(call, VALUE_DIM) + 2 * VECTOR_BYTES
        task = count_up(call + 8 * NEXT)
        while task < tasks:
            row, head = task // splits // at(call, HEADS), task // splits % at(call, HEADS)
            for tile in range(tiles):
                out = at(call, PARTIALS) + (task * tiles + tile) * size
                attend(call, scratch, row, head, task % splits, few * tile, out)
            if count_up(call + 8 * DONE) == tasks - 1:
                _merge(call, width)
            task = count_up(call + 8 * NEXT)

    return work


_work_1, _work_2, _work_4, _work_8, _work_16 = (_work(width) for width in WIDTHS)


def width_for(group: int) -> int:
    """Return the channels of a vector for so many queries of a KV head."""
    return next(width for width in reversed(WIDTHS) if width == 1 or group * width <= LANES)


def _entry(width: int, sources: int) -> Callable[[int], None]:
    # Only the branch of this width is compiled. What numba keeps it by are its name and the values of the two names.
    @named(f"attend_to_lists_{width}")
    def attend_to_lists(call):  # type: ignore[no-untyped-def]
        if sources:
            if width == 1:
                _work_1(call)
            elif width == 2:
                _work_2(call)
            elif width == 4:
                _work_4(call)
            elif width == 8:
                _work_8(call)
            else:
                _work_16(call)

    return attend_to_lists


@functools.cache
def compiled(width: int) -> int:
    """Return the address of a function that takes that of a call's fields, compiled for vectors of so many channels."""
    return address_of(_entry(width, sources()))
