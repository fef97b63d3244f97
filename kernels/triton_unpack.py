# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Unpacking codes in registers, as operands of tensor cores.

Codes are read as 16-bit words, the bytes of two neighbouring channels, and come apart into the even and the odd
channels, which are multiplied separately. Two words (of neighbouring tokens, or of the next two channels) lie in one
register, so that the bytes 0 and 2 of a register are one pair of operands and the bytes 1 and 3 the other.

The arithmetic is PTX, because Triton's own conversions cost about five instructions per code where one will do, and
decoding, not memory, then limits the speed of 4-bit pages. The interpreter and float32 take the plain path instead.
"""

import triton
import triton.language as tl

from .triton_basics import e4m3, high_byte, low_byte, stack, unstack

# `$0` and `$1` are the operands of even and odd channels, `$2` the words, `$3` a shift, `$5` a mask and `$7` a number
# to subtract. The numbers between are those of the second element, which are the same. With 0x43 above it a code of up
# to seven bits is 128 + code in bfloat16, with 0x64 above it a code of up to ten is 1024 + code in float16.
INTEGERS_BFLOAT16 = """
{
.reg .b32 a;
shr.u32 a, $2, $3;
and.b32 a, a, $5;
prmt.b32 $0, a, 0x43, 0x4240;
prmt.b32 $1, a, 0x43, 0x4341;
}
"""
INTEGERS_FLOAT16 = """
{
.reg .b32 a, b, one;
mov.b32 one, 0x3C003C00;
shr.u32 a, $2, $3;
and.b32 a, a, $5;
prmt.b32 b, a, 0x64, 0x4240;
fma.rn.f16x2 $0, b, one, $7;
prmt.b32 b, a, 0x64, 0x4341;
fma.rn.f16x2 $1, b, one, $7;
}
"""
# The eighth bit decides which number is subtracted from 128 + the low seven: 128 or 256. lop3 0x6A is (a & b) ^ c, 0xEA
# is (a & b) | c.
BYTES_BFLOAT16 = """
{
.reg .b32 a, b, one;
mov.b32 one, 0x3F803F80;
prmt.b32 a, $2, 0, 0x4240;
lop3.b32 b, a, 0x00800080, 0xC380C380, 0x6A;
lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, a, one, b;
prmt.b32 a, $2, 0, 0x4341;
lop3.b32 b, a, 0x00800080, 0xC380C380, 0x6A;
lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, a, one, b;
}
"""
# Sign, exponent and mantissa of e4m3 moved to their places, and multiplied by 2**120 or 2**8, by which the biases of
# the exponents differ. NaN becomes 480.
FP8_BFLOAT16 = """
{
.reg .b32 a, b, c, z;
mov.b32 c, 0x7B807B80;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x2404;
and.b32 b, a, 0x7F007F00;
shr.u32 b, b, 4;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.bf16x2 $0, a, c, z;
prmt.b32 a, $2, 0, 0x3414;
and.b32 b, a, 0x7F007F00;
shr.u32 b, b, 4;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.bf16x2 $1, a, c, z;
}
"""
FP8_FLOAT16 = """
{
.reg .b32 a, b, c, z;
mov.b32 c, 0x5C005C00;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x2404;
and.b32 b, a, 0x7F007F00;
shr.u32 b, b, 1;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.f16x2 $0, a, c, z;
prmt.b32 a, $2, 0, 0x3414;
and.b32 b, a, 0x7F007F00;
shr.u32 b, b, 1;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.f16x2 $1, a, c, z;
}
"""
_INTEGERS_BFLOAT16: tl.constexpr = tl.constexpr(INTEGERS_BFLOAT16)
_INTEGERS_FLOAT16: tl.constexpr = tl.constexpr(INTEGERS_FLOAT16)
_BYTES_BFLOAT16: tl.constexpr = tl.constexpr(BYTES_BFLOAT16)
_FP8_BFLOAT16: tl.constexpr = tl.constexpr(FP8_BFLOAT16)
_FP8_FLOAT16: tl.constexpr = tl.constexpr(FP8_FLOAT16)


@triton.jit
def unpack(
    words, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr
):
    """Return the codes at bit SHIFT of either byte of int16 words, less CENTRE (an integer).

    Two tensors of the words' shape and of `dtype`, for even and odd channels. Numbers of kind "fp8" come as they are;
    codes of up to four bits in bfloat16 plus 128, which :func:`key_products` and :func:`value_sums` know.
    """
    if not ASM:
        low, high = low_byte(words), high_byte(words)
        if KIND == "fp8":
            even, odd = e4m3(low).to(dtype), e4m3(high).to(dtype)
        else:
            LEVELS: tl.constexpr = 255 if KIND == "int8" else (15 if KIND == "int4" else 3)
            even = (((low >> SHIFT) & LEVELS).to(tl.float32) - CENTRE).to(dtype)
            odd = (((high >> SHIFT) & LEVELS).to(tl.float32) - CENTRE).to(dtype)
    else:
        BFLOAT16: tl.constexpr = dtype == tl.bfloat16
        if KIND == "fp8" or (KIND == "int8" and BFLOAT16):
            BYTES: tl.constexpr = _BYTES_BFLOAT16 if KIND == "int8" else (_FP8_BFLOAT16 if BFLOAT16 else _FP8_FLOAT16)
            even, odd = tl.inline_asm_elementwise(BYTES, "=r,=r,r", [words], (tl.int16, tl.int16), True, 2)
        else:
            INTEGERS: tl.constexpr = _INTEGERS_BFLOAT16 if BFLOAT16 else _INTEGERS_FLOAT16
            MASK: tl.constexpr = 0xFFFFFFFF if KIND == "int8" else (0x0F0F0F0F if KIND == "int4" else 0x03030303)
            # Twice -(1024 + CENTRE) as float16.
            LESS: tl.constexpr = 0x10001 * (0xE400 + CENTRE)
            even, odd = tl.inline_asm_elementwise(
                INTEGERS, "=r,=r,r,r,r,r,r,r,r", [words, SHIFT, MASK, LESS], (tl.int16, tl.int16), True, 2
            )
        even, odd = even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)
    return even, odd


@triton.jit
def load_words(codes, t, c, ROWS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Load words of channels c from a page's codes: of tokens t, t + len(t), t + 2 * len(t), ..., lowest bits first.

    Tokens and channels are given as a column and a row, or as a row and a column.
    """
    words = tl.load(codes + t % ROWS * C + c, mask=(c < C) & (t >= 0), other=0)
    if t.shape[0] * t.shape[1] > ROWS:
        # Rows too few for an operand are repeated, shifted so that repetitions hold the next tokens.
        words = words >> (t // ROWS % (8 // BITS) * BITS).to(tl.int16)
    return words


@triton.jit
def load_dense(page, first, count, t, c, D: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """Load channels `first + c` of a page that is stored as it is, 0 in slots that hold no token.

    Tokens and channels are given as a column and a row, or as a row and a column.
    """
    d = first + c
    return tl.load(page + t * D + d, mask=(t < count) & (c < C) & (d < D), other=0.0).to(dtype)


@triton.jit
def load_vector(pointer, page, lane, SIZE: tl.constexpr, USED: tl.constexpr):
    """Load one number per lane of a page's row of SIZE, or nothing where the kind has no such row."""
    return tl.load(pointer + page * SIZE + lane, mask=lane < SIZE, other=0) if USED else 0


@triton.jit
def outlier_parts(fine, t, ROWS: tl.constexpr, dtype: tl.constexpr):
    """Return the finer channels' shares of a step, `(tokens, 16)`; all but four columns mean nothing."""
    shift = (t // ROWS % 2 * 4)[:, None] + (tl.arange(0, 16) % 4 * 8)[None, :]
    return (((fine[:, None] >> shift) & 15).to(tl.float32) * 0.0625 - 0.46875).to(dtype)


@triton.jit
def _key_plane(words, q0, q1, start, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, ASM: tl.constexpr):
    even, odd = unpack(words, SHIFT, KIND, CENTRE, q0.dtype, ASM)
    logits = tl.dot(even, q0, start, input_precision="ieee")
    return tl.dot(odd, q1, logits, input_precision="ieee")


@triton.jit
def key_products(
    words, q0, q1, PLANES: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return the products of a page's codes with the query, `(tokens, BLOCK_G)`."""
    start = tl.full((words.shape[0], q0.shape[1]), 0.0, tl.float32)
    NARROW: tl.constexpr = (KIND == "int4" or KIND == "int2") and q0.dtype == tl.bfloat16
    if ASM and NARROW:
        # What 128 + code, instead of code - CENTRE, is too much. Tensor cores sum in float32: no digit is lost that
        # rounding the query has left.
        most = tl.full((words.shape[0], words.shape[1]), -128.0 - CENTRE, q0.dtype)
        start = tl.dot(most, q1, tl.dot(most, q0, start))
    logits = _key_plane(words, q0, q1, start, 0, KIND, CENTRE, ASM)
    if PLANES > 1:
        logits = stack(logits, _key_plane(words, q0, q1, start, SHIFT, KIND, CENTRE, ASM))
    if PLANES > 2:
        third = _key_plane(words, q0, q1, start, 2 * SHIFT, KIND, CENTRE, ASM)
        logits = stack(logits, stack(third, _key_plane(words, q0, q1, start, 3 * SHIFT, KIND, CENTRE, ASM)))
    return logits


@triton.jit
def _value_plane(
    words, p, even_sum, odd_sum, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    even, odd = unpack(words, SHIFT, KIND, CENTRE, p.dtype, ASM)
    even_sum = tl.dot(even, p, even_sum, input_precision="ieee")
    odd_sum = tl.dot(odd, p, odd_sum, input_precision="ieee")
    return even_sum, odd_sum


@triton.jit
def value_sums(
    words, p, PLANES: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return the sums of a page's codes with weights `(tokens, BLOCK_G)`, `(channels / 2, BLOCK_G)` each."""
    even = tl.full((words.shape[0], p.shape[1]), 0.0, tl.float32)
    NARROW: tl.constexpr = (KIND == "int4" or KIND == "int2") and p.dtype == tl.bfloat16
    if ASM and NARROW:
        even = tl.dot(tl.full((words.shape[0], p.shape[0]), -128.0 - CENTRE, p.dtype), p, even)
    odd = even
    if PLANES == 1:
        even, odd = _value_plane(words, p, even, odd, 0, KIND, CENTRE, ASM)
    elif PLANES == 2:
        p0, p1 = unstack(p)
        even, odd = _value_plane(words, p0, even, odd, 0, KIND, CENTRE, ASM)
        even, odd = _value_plane(words, p1, even, odd, SHIFT, KIND, CENTRE, ASM)
    else:
        low, high = unstack(p)
        p0, p1 = unstack(low)
        p2, p3 = unstack(high)
        even, odd = _value_plane(words, p0, even, odd, 0, KIND, CENTRE, ASM)
        even, odd = _value_plane(words, p1, even, odd, SHIFT, KIND, CENTRE, ASM)
        even, odd = _value_plane(words, p2, even, odd, 2 * SHIFT, KIND, CENTRE, ASM)
        even, odd = _value_plane(words, p3, even, odd, 3 * SHIFT, KIND, CENTRE, ASM)
    return even, odd
