"""The inner loops of attention on a CPU: tiles of products and of weighted sums that stay in the registers.

A vector holds `width` channels of each of `16 / width` queries, one query after the other. What is computed of tokens
holds those queries of `width` tokens, one token after the other.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numba_vectors import (
    F32,
    I8,
    I32,
    INTS,
    LANES,
    constants,
    emit_fma,
    emit_folded,
    emit_larger,
    emit_load,
    emit_prefetch,
    emit_shuffle,
    emit_splat,
    emit_store,
    emit_sum,
    function_of,
    number,
    vector,
)

#: Channels of a query that a vector may hold.
WIDTHS = (1, 2, 4, 8, 16)
#: Tokens whose products with the queries are summed at the same time: enough to wait for none of the sums.
TOKENS = 16
#: Queries, at most, whose values are summed at the same time.
QUERIES = 8


def _products(width: int) -> Any:
    few = LANES // width

    def emit(
        builder: Any, queries: Any, steps: Any, rows: Any, row_bytes: Any, last: Any, out: Any, ahead: Any, by: Any
    ) -> None:
        starts = []
        for token in range(TOKENS):
            row = number(token)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            starts.append(builder.add(rows, builder.mul(row, row_bytes)))
        sums = [cgutils.alloca_once_value(builder, constants(0.0)) for _ in starts]
        with cgutils.for_range(builder, steps) as loop:
            query = emit_load(builder, builder.add(queries, builder.mul(loop.index, number(4 * LANES))))
            offset = builder.mul(loop.index, number(4 * width))
            emit_prefetch(builder, builder.add(ahead, builder.mul(loop.index, by)))
            for start, total in zip(starts, sums, strict=True):
                key = _repeated(builder, builder.add(start, offset), width)
                builder.store(emit_fma(builder, query, key, builder.load(total)), total)
        for token, total in enumerate(sums):
            product = emit_folded(builder, builder.load(total), emit_sum, _steps(1, width))
            product = emit_shuffle(builder, product, list(range(0, LANES, width)))
            emit_store(builder, builder.add(out, number(4 * few * token)), product)

    return function_of(types.none, [types.int64] * 8, emit)


def _repeated(builder: Any, address: Any, width: int) -> Any:
    """Load `width` floats, and repeat them until a vector is full."""
    if width == LANES:
        return emit_load(builder, address)
    if width == 1:
        return emit_splat(builder, emit_load(builder, address, F32))
    few = emit_load(builder, address, ir.VectorType(F32, width))
    return emit_shuffle(builder, few, [lane % width for lane in range(LANES)])


def _steps(first: int, end: int) -> list[int]:
    """Return the powers of two from `first` on, below `end`."""
    return [1 << power for power in range(5) if first <= 1 << power < end]


def _weighted(width: int, columns: int) -> Any:
    few = LANES // width
    queries = min(few, QUERIES)

    def emit(
        builder: Any, weights: Any, tokens: Any, rows: Any, row_bytes: Any, scales: Any, out: Any, out_bytes: Any
    ) -> None:
        places, sums = [], []
        for query in range(queries):
            scale = emit_splat(builder, emit_load(builder, builder.add(scales, number(4 * query)), F32))
            row = builder.add(out, builder.mul(out_bytes, number(query)))
            places.append([builder.add(row, number(4 * LANES * column)) for column in range(columns)])
            scaled = [builder.fmul(scale, emit_load(builder, place)) for place in places[-1]]
            sums.append([cgutils.alloca_once_value(builder, each) for each in scaled])
        with cgutils.for_range(builder, tokens) as loop:
            row = builder.add(rows, builder.mul(loop.index, row_bytes))
            values = [emit_load(builder, builder.add(row, number(4 * LANES * column))) for column in range(columns)]
            of_token = builder.add(weights, builder.mul(loop.index, number(4 * few)))
            for query in range(queries):
                weight = emit_splat(builder, emit_load(builder, builder.add(of_token, number(4 * query)), F32))
                for value, total in zip(values, sums[query], strict=True):
                    builder.store(emit_fma(builder, weight, value, builder.load(total)), total)
        for of_query, totals in zip(places, sums, strict=True):
            for place, total in zip(of_query, totals, strict=True):
                emit_store(builder, place, builder.load(total))

    return function_of(types.none, [types.int64] * 7, emit)


def columns_of(width: int) -> int:
    """Return how many vectors of channels a tile of sums has for each query, so that it fills the registers."""
    return 2 if LANES // width >= QUERIES else 4


def _in_place(builder: Any, place: Any, width: int) -> Any:
    """Return for each lane whether it is the one at a place in its group of `width` lanes."""
    lanes = ir.Constant(INTS, [lane % width for lane in range(LANES)])
    return builder.icmp_signed("==", lanes, emit_splat(builder, place))


def _picks(width: int) -> Any:
    def emit(builder: Any, value: Any, place: Any) -> Any:
        alone = builder.select(_in_place(builder, place, width), value, constants(0.0))
        return emit_folded(builder, alone, emit_sum, _steps(1, width))

    return function_of(vector, [vector, types.int32], emit)


def _places(width: int) -> Any:
    def emit(builder: Any, value: Any, place: Any) -> Any:
        return builder.select(_in_place(builder, place, width), value, constants(0.0))

    return function_of(vector, [vector, types.int32], emit)


def _folds(width: int, combine: Callable[[Any, Any, Any], Any]) -> Any:
    steps = _steps(LANES // width, LANES)
    return function_of(vector, [vector], lambda builder, value: emit_folded(builder, value, combine, steps))


def _fine(channels: int) -> Any:
    def emit(builder: Any, address: Any, shift: Any, out: Any) -> None:
        ints, floats = ir.VectorType(I32, 4), ir.VectorType(F32, 4)
        wide = builder.zext(emit_load(builder, address, ir.VectorType(I8, 4)), ints)
        fine = builder.and_(builder.lshr(wide, emit_splat(builder, shift, 4)), ir.Constant(ints, [15] * 4))
        value = builder.fsub(builder.sitofp(fine, floats), ir.Constant(floats, [7.5] * 4))
        if channels > 4:
            lanes = ir.Constant(ir.VectorType(I32, channels), [min(lane, 4) for lane in range(channels)])
            value = builder.shuffle_vector(value, ir.Constant(floats, [0.0] * 4), lanes)
        emit_store(builder, out, value)

    return function_of(types.none, [types.int64, types.int32, types.int64], emit)


#: By width. `multiply(queries, steps, rows, row_bytes, last, out, ahead, by)` writes the products of queries, of
#: `steps` vectors, with the keys in TOKENS rows, for those beyond the row `last` that of `last`. On the way it has
#: `steps` lines fetched, one every `by` bytes from `ahead` on.
multiply = {width: _products(width) for width in WIDTHS}
#: `add_values(weights, tokens, rows, row_bytes, scales, out, out_bytes)` scales a sum for each of `min(16 / width,
#: QUERIES)` queries, and adds to it the values in some rows with their weights: 16 channels, `columns_of` times.
add_values = {width: _weighted(width, columns_of(width)) for width in WIDTHS}
add_few_values = {width: _weighted(width, 1) for width in WIDTHS}
#: The lane at a place in each group of channels, in all lanes of the group; and vectors with zeros but for that lane.
pick, place = ({width: make(width) for width in WIDTHS} for make in (_picks, _places))
#: The largest, or the sum, of all tokens of each query.
largest = {width: _folds(width, emit_larger) for width in WIDTHS}
summed = {width: _folds(width, emit_sum) for width in WIDTHS}
#: `store_fine(address, shift, out)` stores four of the numbers 0..15 in four bytes, less 7.5, as floats, and zeros
#: behind them up to `width` floats.
store_fine = {width: _fine(max(4, width)) for width in WIDTHS}
