"""Tokens of a page as rows of floats, for the compiled CPU kernel."""

import math

from numba import float32, int32, njit

from .decode_layout import (
    BFLOAT16,
    BITS,
    CODES,
    DIM,
    FLOAT32,
    FLOOR,
    FLOOR_IS_INT8,
    FP8,
    INTEGERS,
    KIND,
    LATENT,
    LATENT_DIM,
    LATENT_KIND,
    SPREAD,
)
from .numba_code_tiles import CODE_BITS, store_rows
from .numba_vectors import (
    LANES,
    exp,
    fma,
    load,
    load_bfloat16,
    load_codes,
    load_float16,
    load_fp8,
    load_int8,
    load_uint8,
    mul,
    read_int64,
    read_uint8,
    splat,
    store,
    sub,
)
from .page_codes import FLOOR_UNITS, FP8_MAX, SPREAD_ONE, SPREAD_STEPS

_SPREAD_ONE, _LOG_STEP = float(SPREAD_ONE), math.log(2) / SPREAD_STEPS
#: Tokens that are turned into floats at a time.
BLOCK = 64
_store_rows_2, _store_rows_4, _store_rows_8 = (store_rows[bits] for bits in CODE_BITS)
# Those of float8 are loaded 2 ** 120 times too small.
_FP8_UNIT, _FLOOR_UNIT = 2.0**120 / FP8_MAX, 1 / FLOOR_UNITS


@njit(inline="always")
def at(record, field):  # type: ignore[no-untyped-def]
    """Return a field of a record."""
    return read_int64(record + 8 * field)


@njit(inline="always")
def part_at(part, field, head, page):  # type: ignore[no-untyped-def]
    """Return where a tensor of a pool has a page of a head, its strides being the next two fields."""
    return at(part, field) + head * at(part, field + 1) + page * at(part, field + 2)


@njit(inline="always")
def span_of(address):  # type: ignore[no-untyped-def]
    """Return the range that one spread code stands for, as a vector."""
    return exp(mul(splat(float32(read_uint8(address)) - float32(_SPREAD_ONE)), splat(float32(_LOG_STEP))))


@njit(inline="always")
def _spans(address):  # type: ignore[no-untyped-def]
    """Return the ranges that 16 spread codes stand for."""
    return exp(mul(sub(load_uint8(address), splat(float32(_SPREAD_ONE))), splat(float32(_LOG_STEP))))


@njit
def rows_of(part, head, page, first, tokens, size, out, out_bytes, steps):  # type: ignore[no-untyped-def]
    """Write `tokens` tokens, from `first` on, of a page of `size` as rows of floats: coded channels, then latent ones.

    Of keys the fine parts of outliers are left out. More rows are written, up to BLOCK, where codes come in bytes of
    several tokens. There are two floats for each channel at `steps`.
    """
    kind, dim = at(part, KIND), at(part, DIM)
    if kind == INTEGERS:
        steps_of(part, head, page, steps)
        codes, bits, leasts = part_at(part, CODES, head, page), at(part, BITS), steps + 4 * dim
        per_byte = 8 // bits
        rows = (size + per_byte - 1) // per_byte
        if first == 0 and rows * per_byte <= BLOCK:
            # Of fewer tokens than rows the other planes come to rows that nobody reads.
            rows = min(rows, tokens)
            if bits == 2:
                _store_rows_2(codes, rows, dim, steps, leasts, out, out_bytes)
            elif bits == 4:
                _store_rows_4(codes, rows, dim, steps, leasts, out, out_bytes)
            else:
                _store_rows_8(codes, rows, dim, steps, leasts, out, out_bytes)
        else:
            _integer_rows(codes, bits, rows, dim, first, tokens, steps, out, out_bytes)
    elif kind == FP8:
        codes, spread = part_at(part, CODES, head, page) + first * dim, part_at(part, SPREAD, head, page)
        for channel in range(0, dim, LANES):
            step = mul(_spans(spread + channel), splat(float32(_FP8_UNIT)))
            for token in range(tokens):
                value = mul(load_fp8(codes + token * dim + channel), step)
                store(out + token * out_bytes + 4 * channel, value)
    else:
        _copied_rows(kind, part_at(part, CODES, head, page), dim, first, tokens, out, out_bytes)
    if at(part, LATENT_DIM):
        latent = part_at(part, LATENT, head, page)
        kind, more = at(part, LATENT_KIND), at(part, LATENT_DIM)
        _copied_rows(kind, latent, more, first, tokens, out + 4 * dim, out_bytes)


@njit
def steps_of(part, head, page, steps):  # type: ignore[no-untyped-def]
    """Write what `1 + code / 2 ** bits` of each channel of a page is multiplied by, and then what is added."""
    spread, floor = part_at(part, SPREAD, head, page), part_at(part, FLOOR, head, page)
    leasts, values = steps + 4 * at(part, DIM), 1 << at(part, BITS)
    unit = splat(float32(values / (values - 1)))
    for channel in range(0, at(part, DIM), LANES):
        span = _spans(spread + channel)
        if at(part, FLOOR_IS_INT8):
            least = mul(load_int8(floor + channel), mul(span, splat(float32(_FLOOR_UNIT))))
        else:
            least = load_float16(floor + 2 * channel)
        step = mul(span, unit)
        store(steps + 4 * channel, step)
        store(leasts + 4 * channel, sub(least, step))


@njit
def _copied_rows(kind, source, dim, first, tokens, out, out_bytes):  # type: ignore[no-untyped-def]
    size = 4 if kind == FLOAT32 else 2
    for token in range(tokens):
        row, target = source + (first + token) * dim * size, out + token * out_bytes
        for channel in range(0, dim, LANES):
            if kind == FLOAT32:
                value = load(row + 4 * channel)
            elif kind == BFLOAT16:
                value = load_bfloat16(row + 2 * channel)
            else:
                value = load_float16(row + 2 * channel)
            store(target + 4 * channel, value)


@njit
def _integer_rows(codes, bits, rows, dim, first, tokens, steps, out, out_bytes):  # type: ignore[no-untyped-def]
    """Write some tokens of a page that is too large to be written at once."""
    leasts, mask = steps + 4 * dim, int32(((1 << bits) - 1) << (23 - bits))
    done = 0
    # A row of bytes has a token in each of its planes.
    while done < tokens:
        plane = (first + done) // rows
        row = first + done - plane * rows
        some, shift = min(rows - row, tokens - done), int32(23 - bits - plane * bits)
        source, target = codes + row * dim, out + done * out_bytes
        for _ in range(some):
            for channel in range(0, dim, LANES):
                value = load_codes(source + channel, shift, mask)
                store(target + 4 * channel, fma(value, load(steps + 4 * channel), load(leasts + 4 * channel)))
            source, target = source + dim, target + out_bytes
        done += some
