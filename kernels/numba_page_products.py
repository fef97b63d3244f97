"""What the compiled CPU kernel does with one page: products of its keys with queries, and sums of its values.

Keys become floats a block of tokens at a time, in memory that stays in the core's cache, as all queries read them.
"""

from collections.abc import Callable
from typing import Any

from numba import float32, int32, int64, njit

from . import numba_code_tiles, numba_tiles
from .decode_layout import (
    BITS,
    CODES,
    CODES_PAGE,
    DIM,
    FINE,
    FLOAT32,
    INTEGERS,
    KIND,
    LATENT_DIM,
    OUTLIERS,
    SPREAD,
)
from .numba_code_tiles import CODE_BITS, COLUMNS
from .numba_decode_rows import BLOCK, at, part_at, rows_of, span_of, steps_of
from .numba_tiles import QUERIES, TOKENS, columns_of
from .numba_vectors import (
    LANES,
    add,
    load,
    mul,
    prefetch,
    read_int16,
    splat,
    store,
    write_float,
)

VECTOR_BYTES = 4 * LANES


def named(name: str) -> Callable[[Any], Any]:
    """Give a function that is made for several widths a name of its own.

    numba tells functions apart by name and a number that counts within a process. Of the same name those of two widths,
    compiled in two processes and kept on disk, would be taken for one another by a third.
    """

    def rename(function: Any) -> Any:
        function.__name__ = function.__qualname__ = name
        return function

    return rename


@njit
def fetch(part, head, page, first, tokens, size):  # type: ignore[no-untyped-def]
    """Have the processor fetch the codes of a page's first tokens while it is busy with others.

    It cannot know which page comes next.
    """
    row = at(part, CODES_PAGE) // size
    start = part_at(part, CODES, head, page) + first * row
    for offset in range(0, tokens * row, 64):
        prefetch(start + offset)


@njit
def in_bytes(part):  # type: ignore[no-untyped-def]
    """Return whether each channel of a part takes a byte: pages are fetched bit by bit, in the course of other work.

    As many lines at once as such a page has would have to wait for each other, and all that comes behind them.
    """
    alone = at(part, LATENT_DIM) == 0 and at(part, DIM) % (COLUMNS * LANES) == 0
    return at(part, KIND) == INTEGERS and at(part, BITS) == 8 and alone


def products_with(width: int) -> Any:
    """Return the function that multiplies a page's keys with as many queries as a vector of `width` channels has."""
    multiply, pick, place, store_fine = (
        each[width] for each in (numba_tiles.multiply, numba_tiles.pick, numba_tiles.place, numba_tiles.store_fine)
    )
    few, more = LANES // width, max(4, width)

    @njit
    @named(f"add_outliers_{width}")
    def add_outliers(keys, head, page, first, tokens, size, queries, steps, rows, row_bytes):  # type: ignore[no-untyped-def]
        """Write the fine parts of outliers behind the keys as further channels, and what meets them to the queries.

        A fine part f stands for `step * ((f + 0.5) / 16 - 0.5)`.
        """
        channels, fine = part_at(keys, OUTLIERS, head, page), part_at(keys, FINE, head, page)
        spread = part_at(keys, SPREAD, head, page)
        unit = splat(float32(1 / 16 / ((1 << at(keys, BITS)) - 1)))
        for number in range(4):
            channel = int64(read_int16(channels + 2 * number))
            known = pick(load(queries + VECTOR_BYTES * (channel // width)), int32(channel % width))
            added = place(mul(known, mul(span_of(spread + channel), unit)), int32(number % width))
            where = queries + VECTOR_BYTES * (steps + number // width)
            store(where, add(added, load(where)) if number % width else added)
        half, done = (size + 1) // 2, 0
        while done < tokens:
            plane = (first + done) // half
            row = first + done - plane * half
            some = min(half - row, tokens - done)
            for token in range(some):
                target = rows + (done + token) * row_bytes + 4 * steps * width
                store_fine(fine + 4 * (row + token), int32(4 * plane), target)
            done += some

    @njit
    @named(f"products_of_{width}")
    def products_of(keys, values, head, page, stored, size, queries, rows, of_channels, logits):  # type: ignore[no-untyped-def]
        """Write the products of the queries with the keys of a page, and have its values fetched.

        Values :func:`in_bytes` take as many lines as there are steps at most: of few queries not all of them.
        """
        dim, value_dim = at(keys, DIM) + at(keys, LATENT_DIM), at(values, DIM)
        for first in range(0, stored, BLOCK):
            tokens, products = min(BLOCK, stored - first), dim // width
            key_rows, row_bytes = part_at(keys, CODES, head, page) + 4 * first * dim, 4 * dim
            if at(keys, KIND) != FLOAT32 or at(keys, LATENT_DIM):
                has_outliers = at(keys, OUTLIERS) != 0
                key_rows, row_bytes = rows, 4 * (dim + LANES)
                rows_of(keys, head, page, first, tokens, size, rows, row_bytes, of_channels)
                if has_outliers:
                    add_outliers(keys, head, page, first, tokens, size, queries, products, rows, row_bytes)
                    products += more // width
            for token in range(0, tokens, TOKENS):
                written = logits + 4 * few * (first + token)
                some, ahead, by = min(TOKENS, tokens - token), logits, 0
                if in_bytes(values):
                    ahead = part_at(values, CODES, head, page) + (first + token) * value_dim
                    by = some * value_dim // products
                else:
                    fetch(values, head, page, first + token, some, size)
                key = key_rows + token * row_bytes
                multiply(queries, products, key, row_bytes, tokens - 1 - token, written, ahead, by)

    return products_of


def sums_of(width: int) -> Any:
    """Return the function that adds up the values of a page for as many queries as a vector of `width` channels has."""
    add_values, add_few_values = numba_tiles.add_values[width], numba_tiles.add_few_values[width]
    add_codes_2, add_codes_4, add_codes_8 = (numba_code_tiles.add_codes[width, bits] for bits in CODE_BITS)
    few, columns = LANES // width, columns_of(width)
    tile = min(few, QUERIES)

    @njit
    @named(f"add_page_{width}")
    def add_page(values, head, page, stored, size, count, weights, scales, rows, of_channels, out, ahead):  # type: ignore[no-untyped-def]
        """Scale what has been summed, and add to it the values of a page with their weights.

        Of values :func:`in_bytes` it has as many bytes from `ahead` on fetched.
        """
        dim, kind = at(values, DIM) + at(values, LATENT_DIM), at(values, KIND)
        codes = part_at(values, CODES, head, page)
        if kind == INTEGERS and not at(values, LATENT_DIM) and dim % (COLUMNS * LANES) == 0:
            bits, leasts = at(values, BITS), of_channels + 4 * dim
            planes = 8 // bits
            byte_rows = (size + planes - 1) // planes
            used = min(byte_rows, stored)
            # What no token has written weighs nothing.
            for offset in range(4 * few * stored, 4 * few * planes * used, 4):
                write_float(weights + offset, float32(0))
            steps_of(values, head, page, of_channels)
            for one in range(0, count, tile):
                of_query, scaled = weights + 4 * one, scales + 4 * one
                for channel in range(0, dim, COLUMNS * LANES):
                    step, least = of_channels + 4 * channel, leasts + 4 * channel
                    target = out + 4 * (one * dim + channel)
                    if bits == 2:
                        add_codes_2(of_query, used, codes + channel, dim, step, least, scaled, target, ahead)
                    elif bits == 4:
                        add_codes_4(of_query, used, codes + channel, dim, step, least, scaled, target, ahead)
                    else:
                        some = ahead + channel * used
                        add_codes_8(of_query, used, codes + channel, dim, step, least, scaled, target, some)
            return
        for first in range(0, stored, BLOCK):
            tokens = min(BLOCK, stored - first)
            value_rows, row_bytes = codes + 4 * first * dim, 4 * dim
            if kind != FLOAT32 or at(values, LATENT_DIM):
                value_rows = rows
                rows_of(values, head, page, first, tokens, size, rows, row_bytes, of_channels)
            for one in range(0, count, tile):
                of_query, scaled, channel = weights + 4 * (few * first + one), scales + 4 * one, 0
                target = out + 4 * one * dim
                while channel + columns * LANES <= dim:
                    source = value_rows + 4 * channel
                    add_values(of_query, tokens, source, row_bytes, scaled, target + 4 * channel, 4 * dim)
                    channel += columns * LANES
                while channel < dim:
                    source = value_rows + 4 * channel
                    add_few_values(of_query, tokens, source, row_bytes, scaled, target + 4 * channel, 4 * dim)
                    channel += LANES
            store(scales, splat(float32(1)))

    return add_page
