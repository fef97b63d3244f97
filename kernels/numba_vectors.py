"""Vectors of 16 floats for kernels that numba compiles, where its own vectoriser finds none: loads, sums, exponentials.

Addresses are integers, as `data_ptr()` returns them, and need not be aligned. Where a processor's registers hold fewer
than 16 floats, LLVM takes several.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

#: Floats of a vector.
LANES = 16

F32, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
VECTOR, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class VectorType(types.Type):
    """The numba type of 16 floats."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


# What is emitted, for this module and for tiles


def number(value: int) -> Any:
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


def constants(value: float) -> Any:
    """Return a constant vector of one float."""
    return ir.Constant(VECTOR, [value] * LANES)


def constant_ints(value: int) -> Any:
    """Return a constant vector of one 32-bit integer."""
    return ir.Constant(INTS, [value] * LANES)


def emit_load(builder: Any, address: Any, kind: Any = VECTOR) -> Any:
    """Load a value of any kind from an address."""
    loaded = builder.load(builder.inttoptr(address, ir.PointerType(kind)))
    loaded.align = 1
    return loaded


def emit_store(builder: Any, address: Any, value: Any) -> None:
    """Store a value at an address."""
    builder.store(value, builder.inttoptr(address, ir.PointerType(value.type))).align = 1


def emit_shuffle(builder: Any, value: Any, lanes: list[int]) -> Any:
    """Return the lanes of a vector at these places."""
    order = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)


def emit_splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Return a vector of one number, as many times as it has lanes."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return emit_shuffle(builder, one, [0] * lanes)


def emit_fma(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return `left * right + addend`, rounded once."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [left, right, addend])


def emit_larger(builder: Any, left: Any, right: Any) -> Any:
    """Return the larger float of each lane, the left one where the right one is NaN."""
    return builder.select(builder.fcmp_ordered(">", right, left), right, left)


def emit_sum(builder: Any, left: Any, right: Any) -> Any:
    """Return the sum of each lane."""
    return builder.fadd(left, right)


def emit_folded(builder: Any, value: Any, combine: Callable[[Any, Any, Any], Any], steps: list[int]) -> Any:
    """Combine lanes with those so many places away, so that all of a group hold what the group comes to."""
    for step in steps:
        value = combine(builder, value, emit_shuffle(builder, value, [lane ^ step for lane in range(LANES)]))
    return value


def emit_fractions(builder: Any, wide: Any, shift: Any, mask: Any) -> Any:
    """Return floats from 1 to 2 whose fractions are integers, shifted to the left, under a mask."""
    fraction = builder.and_(builder.shl(wide, shift), mask)
    return builder.bitcast(builder.or_(fraction, constant_ints(0x3F800000)), VECTOR)


def emit_prefetch(builder: Any, address: Any) -> None:
    """Have the processor fetch the line of its cache at an address."""
    byte = ir.PointerType(I8)
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read, into the first level, as data.
    builder.call(function, [builder.inttoptr(address, byte), *(ir.Constant(I32, number) for number in (0, 3, 1))])


# What kernels call


def function_of(result: Any, arguments: list[Any], emit: Callable[..., Any]) -> Any:
    """Return what kernels call for `emit(builder, *arguments)`, with numba types of arguments and result."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = emit(builder, *args)
        return context.get_dummy_value() if result is types.none else value

    def definition(typing: Any, *given: Any) -> Any:
        return result(*arguments), generate

    # numba counts the arguments by it.
    names = ["typing", *(f"argument_{index}" for index in range(len(arguments)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    definition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(definition)


def _exp(builder: Any, value: Any) -> Any:
    vanishes = builder.fcmp_unordered("<", value, constants(-87.0))
    x = builder.select(vanishes, constants(-87.0), value)
    # A float of this size has no bits for a fraction: the multiple of ln 2 is rounded, and stands in the lowest bits.
    magic = constants(12582912.0)
    shifted = emit_fma(builder, x, constants(1.4426950408889634), magic)
    power = builder.fsub(shifted, magic)
    # ln 2 in two parts, and the polynomial of Cephes' expf (S. Moshier).
    x = emit_fma(builder, power, constants(-0.693359375), x)
    x = emit_fma(builder, power, constants(2.12194440e-4), x)
    result = constants(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        result = emit_fma(builder, result, x, constants(factor))
    exponent = builder.shl(builder.bitcast(shifted, INTS), constant_ints(23))
    result = builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), VECTOR)
    return _or_nan(builder, builder.select(vanishes, constants(0.0), result), value)


def _or_nan(builder: Any, value: Any, other: Any) -> Any:
    """Return a value, and NaN where another is."""
    return builder.select(builder.fcmp_unordered("uno", other, other), other, value)


def _from_bfloat16(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, INTS), constant_ints(16)), VECTOR)


def _from_fp8(builder: Any, bits: Any) -> Any:
    wide = builder.zext(bits, INTS)
    sign = builder.shl(builder.and_(wide, constant_ints(128)), constant_ints(24))
    rest = builder.shl(builder.and_(wide, constant_ints(127)), constant_ints(20))
    return builder.bitcast(builder.or_(sign, rest), VECTOR)


def _codes(builder: Any, address: Any, shift: Any, mask: Any) -> Any:
    wide = builder.zext(emit_load(builder, address, ir.VectorType(I8, LANES)), INTS)
    return emit_fractions(builder, wide, emit_splat(builder, shift), emit_splat(builder, mask))


def _loads(element: Any, convert: Callable[[Any, Any], Any]) -> Any:
    kind = ir.VectorType(element, LANES)
    return function_of(vector, [types.int64], lambda builder, at: convert(builder, emit_load(builder, at, kind)))


def _reads(result: Any, kind: Any) -> Any:
    return function_of(result, [types.int64], lambda builder, address: emit_load(builder, address, kind))


def _writes(kind: Any) -> Any:
    def emit(builder: Any, address: Any, value: Any) -> None:
        emit_store(builder, address, builder.trunc(value, kind))

    return function_of(types.none, [types.int64, types.int64], emit)


def _of_two(emit: Callable[[Any, Any, Any], Any]) -> Any:
    return function_of(vector, [vector, vector], emit)


#: Vectors at an address, and one float as a vector.
load = function_of(vector, [types.int64], emit_load)
store = function_of(types.none, [types.int64, vector], emit_store)
splat = function_of(vector, [types.float32], emit_splat)

#: Lane by lane.
add, larger = _of_two(emit_sum), _of_two(emit_larger)
sub = _of_two(lambda builder, left, right: builder.fsub(left, right))
mul = _of_two(lambda builder, left, right: builder.fmul(left, right))
div = _of_two(lambda builder, left, right: builder.fdiv(left, right))
fma = function_of(vector, [vector] * 3, emit_fma)
or_nan = _of_two(_or_nan)
#: e to the power of each lane, within 1e-7 of it; 0 below -87, NaN of NaN. No lane may be above 88.
exp = function_of(vector, [vector], _exp)

#: 16 numbers of other types at an address. Those of float8 e4m3 are 2 ** 120 times too small: its exponents are counted
#: from another zero.
load_bfloat16 = _loads(ir.IntType(16), _from_bfloat16)
load_float16 = _loads(ir.HalfType(), lambda builder, halves: builder.fpext(halves, VECTOR))
load_fp8 = _loads(I8, _from_fp8)
load_int8 = _loads(I8, lambda builder, bits: builder.sitofp(bits, VECTOR))
load_uint8 = _loads(I8, lambda builder, bits: builder.uitofp(bits, VECTOR))
#: Floats from 1 to 2 whose fractions are the 16 bytes at an address, shifted to the left, under a mask.
load_codes = function_of(vector, [types.int64, types.int32, types.int32], _codes)

#: Single numbers at an address.
read_float, read_int64 = _reads(types.float32, F32), _reads(types.int64, I64)
read_int16, read_uint8 = _reads(types.int16, ir.IntType(16)), _reads(types.uint8, I8)
write_int16, write_int32 = (_writes(kind) for kind in (ir.IntType(16), I32))
write_float = function_of(types.none, [types.int64, types.float32], emit_store)
#: Adds one to an integer that several threads count with, and returns what it was.
count_up = function_of(
    types.int64,
    [types.int64],
    lambda builder, at: builder.atomic_rmw("add", builder.inttoptr(at, ir.PointerType(I64)), number(1), "acq_rel"),
)


def _copy_bytes(builder: Any, target: Any, source: Any, size: Any) -> None:
    target, source = (builder.inttoptr(each, ir.PointerType(I8)) for each in (target, source))
    cgutils.raw_memcpy(builder, target, source, size, 1)


#: Copies so many bytes to an address from another.
copy_bytes = function_of(types.none, [types.int64] * 3, _copy_bytes)


#: Has the processor fetch the line of its cache at an address, which need not be valid.
prefetch = function_of(types.none, [types.int64], emit_prefetch)
