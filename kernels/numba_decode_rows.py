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
def rows_of(part, head, page, first, tokens, size, out, out_bytes):  # type: ignore[no-untyped-def]
    """Write `tokens` tokens, from `first` on, of a page of `size` as rows of floats: coded channels, then latent ones.

    Of keys the fine parts of outliers are left out.
    """
    kind, dim = at(part, KIND), at(part, DIM)
    if kind == INTEGERS:
        _integer_rows(part, head, page, first, tokens, size, out, out_bytes)
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
def _integer_rows(part, head, page, first, tokens, size, out, out_bytes):  # type: ignore[no-untyped-def]
    dim, bits = at(part, DIM), at(part, BITS)
    codes, spread = part_at(part, CODES, head, page), part_at(part, SPREAD, head, page)
    floor = part_at(part, FLOOR, head, page)
    levels, per_byte = (1 << bits) - 1, 8 // bits
    rows = (size + per_byte - 1) // per_byte
    unit = splat(float32(1 / levels))
    for channel in range(0, dim, LANES):
        span = _spans(spread + channel)
        step = mul(span, unit)
        if at(part, FLOOR_IS_INT8):
            least = mul(load_int8(floor + channel), mul(span, splat(float32(_FLOOR_UNIT))))
        else:
            least = load_float16(floor + 2 * channel)
        done = 0
        # A row of bytes has a token in each of its planes.
        while done < tokens:
            plane = (first + done) // rows
            row = first + done - plane * rows
            some = min(rows - row, tokens - done)
            source, target = codes + row * dim + channel, out + done * out_bytes + 4 * channel
            shift, mask = int32(plane * bits), int32(levels)
            if bits == 8:
                for _ in range(some):
                    store(target, fma(load_uint8(source), step, least))
                    source, target = source + dim, target + out_bytes
            else:
                for _ in range(some):
                    store(target, fma(load_codes(source, shift, mask), step, least))
                    source, target = source + dim, target + out_bytes
            done += some
