"""Inner loops over whole pages of integer codes, for the compiled CPU kernel: codes become floats in registers.

A byte holds the codes of `8 / bits` tokens of one channel, its planes; a row of bytes has a byte for each channel. So
one load serves all planes, and how far each is shifted is known when the loop is compiled.

A code is not converted: it is shifted to where a float's fraction begins, below the exponent of 1, and is read as
`1 + code / 2 ** bits`. What a channel's codes are multiplied by, and what is added, have been made for that.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numba_tiles import QUERIES, WIDTHS
from .numba_vectors import (
    F32,
    I8,
    INTS,
    LANES,
    constant_ints,
    emit_fma,
    emit_fractions,
    emit_load,
    emit_prefetch,
    emit_splat,
    emit_store,
    function_of,
    number,
)

#: Widths of codes.
CODE_BITS = (2, 4, 8)
#: Vectors of channels whose values are summed at the same time.
COLUMNS = 2


def _decoded(builder: Any, wide: Any, bits: int, plane: int, step: Any, least: Any) -> Any:
    shift, mask = 23 - bits - plane * bits, ((1 << bits) - 1) << (23 - bits)
    return emit_fma(builder, emit_fractions(builder, wide, constant_ints(shift), constant_ints(mask)), step, least)


def _bytes_at(builder: Any, address: Any) -> Any:
    return builder.zext(emit_load(builder, address, ir.VectorType(I8, LANES)), INTS)


def _stored_rows(bits: int) -> Any:
    def emit(
        builder: Any, codes: Any, rows: Any, channels: Any, steps: Any, leasts: Any, out: Any, out_bytes: Any
    ) -> None:
        of_plane = builder.mul(rows, out_bytes)
        with cgutils.for_range(builder, builder.sdiv(channels, number(LANES))) as vectors:
            first = builder.mul(vectors.index, number(LANES))
            offset = builder.mul(first, number(4))
            step = emit_load(builder, builder.add(steps, offset))
            least = emit_load(builder, builder.add(leasts, offset))
            source, target = builder.add(codes, first), builder.add(out, offset)
            with cgutils.for_range(builder, rows) as loop:
                wide = _bytes_at(builder, builder.add(source, builder.mul(loop.index, channels)))
                row = builder.add(target, builder.mul(loop.index, out_bytes))
                for plane in range(8 // bits):
                    emit_store(builder, row, _decoded(builder, wide, bits, plane, step, least))
                    row = builder.add(row, of_plane)

    return function_of(types.none, [types.int64] * 7, emit)


def _weighted_codes(width: int, bits: int) -> Any:
    few = LANES // width

    def emit(
        builder: Any,
        weights: Any,
        rows: Any,
        codes: Any,
        channels: Any,
        step: Any,
        least: Any,
        scales: Any,
        out: Any,
        ahead: Any,
    ) -> None:
        def of_columns(address: Any, size: int) -> list[Any]:
            return [builder.add(address, number(size * LANES * column)) for column in range(COLUMNS)]

        places, sums = [], []
        for query in range(min(few, QUERIES)):
            scale = emit_splat(builder, emit_load(builder, builder.add(scales, number(4 * query)), F32))
            places.append(of_columns(builder.add(out, builder.mul(channels, number(4 * query))), 4))
            scaled = [builder.fmul(scale, emit_load(builder, place)) for place in places[-1]]
            sums.append([cgutils.alloca_once_value(builder, each) for each in scaled])
        steps, leasts = ([emit_load(builder, place) for place in of_columns(each, 4)] for each in (step, least))
        of_plane = builder.mul(rows, number(4 * few))
        with cgutils.for_range(builder, rows) as loop:
            row = builder.add(codes, builder.mul(loop.index, channels))
            wide = [_bytes_at(builder, place) for place in of_columns(row, 1)]
            if bits == 8:
                emit_prefetch(builder, builder.add(ahead, builder.mul(loop.index, number(COLUMNS * LANES))))
            of_token = builder.add(weights, builder.mul(loop.index, number(4 * few)))
            for plane in range(8 // bits):
                values = [
                    _decoded(builder, each, bits, plane, *known)
                    for each, *known in zip(wide, steps, leasts, strict=True)
                ]
                for query, totals in enumerate(sums):
                    weight = emit_splat(builder, emit_load(builder, builder.add(of_token, number(4 * query)), F32))
                    for value, total in zip(values, totals, strict=True):
                        builder.store(emit_fma(builder, weight, value, builder.load(total)), total)
                of_token = builder.add(of_token, of_plane)
        for of_query, totals in zip(places, sums, strict=True):
            for place, total in zip(of_query, totals, strict=True):
                emit_store(builder, place, builder.load(total))

    return function_of(types.none, [types.int64] * 9, emit)


#: By bits. `store_rows(codes, rows, channels, steps, leasts, out, out_bytes)` writes the tokens in `rows` rows of bytes
#: as rows of floats, plane after plane.
store_rows = {bits: _stored_rows(bits) for bits in CODE_BITS}
#: By width and bits. `add_codes(weights, rows, codes, channels, step, least, scales, out, ahead)` scales a sum for each
#: of `min(16 / width, QUERIES)` queries, and adds to it the values of all tokens in `rows` rows of bytes with their
#: weights: COLUMNS vectors of channels of the `channels` that there are. Of 8 bits it has as many bytes from `ahead` on
#: fetched as it reads.
add_codes = {(width, bits): _weighted_codes(width, bits) for width in WIDTHS for bits in CODE_BITS}
