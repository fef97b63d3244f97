"""Unpacking codes in registers, as operands of tensor cores.

Codes are read as 16-bit words, the bytes of two neighbouring channels, and come apart into the even and the odd channels,
which are multiplied separately. Two words (one of token t, one of token t + 1, or of the next two channels) lie in one
register, so that the bytes 0 and 2 of a register are one pair of operands and the bytes 1 and 3 the other.

The arithmetic is PTX, because Triton's own conversions cost about five instructions per code where one will do, and
decoding, not memory, then limits the speed of 4-bit pages. The interpreter and float32 take the plain path instead.
"""

import torch
import triton
import triton.language as tl

from .triton_basics import e4m3, high_byte, low_byte

# `$0` and `$1` are the operands of even and odd channels, `$2` the words, `$3` a shift, `$5` a mask and `$7` a byte: one
# that makes 128 + code a bfloat16 (0x43) or 1024 + code a float16 (0x64). The numbers between are those of the second
# element, which are the same.
INTEGERS = """
{
.reg .b32 a;
shr.u32 a, $2, $3;
and.b32 a, a, $5;
prmt.b32 $0, a, $7, 0x4240;
prmt.b32 $1, a, $7, 0x4341;
}
"""
# Seven bits at most fit 128 + code. With the eighth bit, (128 + low bits) - 128 is code - 128, without it ... - 256 is.
BYTES_BFLOAT16 = """
{
.reg .b32 a, b, one;
mov.b32 one, 0x3F803F80;
prmt.b32 a, $2, 0, 0x4240;
and.b32 b, a, 0x00800080;
xor.b32 b, b, 0xC380C380;
and.b32 a, a, 0x007F007F;
or.b32 a, a, 0x43004300;
fma.rn.bf16x2 $0, a, one, b;
prmt.b32 a, $2, 0, 0x4341;
and.b32 b, a, 0x00800080;
xor.b32 b, b, 0xC380C380;
and.b32 a, a, 0x007F007F;
or.b32 a, a, 0x43004300;
fma.rn.bf16x2 $1, a, one, b;
}
"""
# Sign, exponent and mantissa of e4m3 moved to their places; the exponents' biases differ by 120 and by 8.
FP8_BFLOAT16 = """
{
.reg .b32 a, b, c, z;
mov.b32 c, 0x7B807B80;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x2404;
and.b32 b, a, 0x80008000;
and.b32 a, a, 0x7F007F00;
shr.u32 a, a, 4;
or.b32 a, a, b;
fma.rn.bf16x2 $0, a, c, z;
prmt.b32 a, $2, 0, 0x3414;
and.b32 b, a, 0x80008000;
and.b32 a, a, 0x7F007F00;
shr.u32 a, a, 4;
or.b32 a, a, b;
fma.rn.bf16x2 $1, a, c, z;
}
"""
FP8_FLOAT16 = """
{
.reg .b32 a, b, c, z;
mov.b32 c, 0x5C005C00;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x2404;
and.b32 b, a, 0x80008000;
and.b32 a, a, 0x7F007F00;
shr.u32 a, a, 1;
or.b32 a, a, b;
fma.rn.f16x2 $0, a, c, z;
prmt.b32 a, $2, 0, 0x3414;
and.b32 b, a, 0x80008000;
and.b32 a, a, 0x7F007F00;
shr.u32 a, a, 1;
or.b32 a, a, b;
fma.rn.f16x2 $1, a, c, z;
}
"""

#: Subtracted from codes, so that the rounding of what multiplies them is that of the decoded tokens.
CENTRES = {"none": 0.0, "fp8": 0.0, "int8": 128.0, "int4": 8.0, "int2": 2.0}

_INTEGERS: tl.constexpr = tl.constexpr(INTEGERS)
_BYTES_BFLOAT16: tl.constexpr = tl.constexpr(BYTES_BFLOAT16)
_FP8_BFLOAT16: tl.constexpr = tl.constexpr(FP8_BFLOAT16)
_FP8_FLOAT16: tl.constexpr = tl.constexpr(FP8_FLOAT16)


@triton.jit
def unpack(words, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return the codes at bit SHIFT of either byte of int16 words, less CENTRE, plus `excess(...)`.

    Two tensors of the words' shape and of `dtype`, for even and odd channels; numbers of kind "fp8" come as they are.
    """
    if not ASM:
        low, high = low_byte(words), high_byte(words)
        if KIND == "fp8":
            even, odd = e4m3(low).to(dtype), e4m3(high).to(dtype)
        else:
            MASK: tl.constexpr = 255 if KIND == "int8" else (15 if KIND == "int4" else 3)
            even = (((low >> SHIFT) & MASK).to(tl.float32) - CENTRE).to(dtype)
            odd = (((high >> SHIFT) & MASK).to(tl.float32) - CENTRE).to(dtype)
    elif KIND == "fp8":
        if dtype == tl.bfloat16:
            even, odd = tl.inline_asm_elementwise(
                _FP8_BFLOAT16, "=r,=r,r", [words], (dtype, dtype), is_pure=True, pack=2
            )
        else:
            even, odd = tl.inline_asm_elementwise(
                _FP8_FLOAT16, "=r,=r,r", [words], (dtype, dtype), is_pure=True, pack=2
            )
    elif KIND == "int8" and dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            _BYTES_BFLOAT16, "=r,=r,r", [words], (dtype, dtype), is_pure=True, pack=2
        )
    else:
        BYTE: tl.constexpr = 255 if KIND == "int8" else (15 if KIND == "int4" else 3)
        MAGIC: tl.constexpr = 0x43 if dtype == tl.bfloat16 else 0x64
        even, odd = tl.inline_asm_elementwise(
            _INTEGERS,
            "=r,=r,r,r,r,r,r,r,r",
            [words, SHIFT, BYTE * 0x01010101, MAGIC],
            (dtype, dtype),
            is_pure=True,
            pack=2,
        )
    return even, odd


def excess(kind: str, dtype: torch.dtype, asm: bool) -> float:
    """Return what remains added to the codes that `unpack` returns; see there."""
    if not asm or kind == "fp8" or (kind == "int8" and dtype == torch.bfloat16):
        return 0.0
    return (128.0 if dtype == torch.bfloat16 else 1024.0) + CENTRES[kind]
