# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Small device functions that the Triton kernels share. Imported through :func:`.dispatch.load` only."""

import triton
import triton.language as tl

# The reductions of triton.language are kernels themselves, compiled or interpreted as Triton was imported; these two
# follow the choice made for ours. The interpreter has fast paths for just these combining functions.


@triton.jit
def row_max(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def row_sum(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    # tl.exp2 spends three more instructions on results below 2**-126, which are as good as zero here.
    if ASM:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def natural_log(base, total):
    """Return the logarithm of `total * 2**base`, `-inf` where the total is 0."""
    return tl.where(total > 0.0, (base + tl.log2(tl.maximum(total, 1.0e-37))) * 0.6931471805599453, float("-inf"))


@triton.jit
def stack(first, second):
    """Put two `(n, m)` tensors on top of one another, `(2 * n, m)`."""
    both = tl.permute(tl.join(first, second), (2, 0, 1))
    return tl.reshape(both, (2 * first.shape[0], first.shape[1]))


@triton.jit
def unstack(x):
    """Undo :func:`stack`."""
    halves = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
    return tl.split(tl.permute(halves, (1, 2, 0)))


@triton.jit
def low_byte(words):
    return words.to(tl.int32) & 0xFF


@triton.jit
def high_byte(words):
    return (words.to(tl.int32) >> 8) & 0xFF


@triton.jit
def signed(byte):
    """Read bytes 0..255, held as int32, as int8."""
    return (byte ^ 0x80) - 0x80


@triton.jit
def spread_share(code, LOG_LEVELS: tl.constexpr, ASM: tl.constexpr):
    """Return the ranges that spread codes (int32) stand for, divided by 2**LOG_LEVELS; see page_codes.spread_values."""
    if ASM:
        # Accurate to 2**-18, enough for operands of 11 bits.
        share = exp2(code.to(tl.float32) * (1.0 / 12.0) - (10.0 + LOG_LEVELS), ASM)
    else:
        SHARE: tl.constexpr = 2.0 ** (0.0 - LOG_LEVELS)
        share = exp2((code.to(tl.float32) - 120.0) * (1.0 / 12.0), ASM) * SHARE
    return share


@triton.jit
def float16_bits(bits):
    """Read 0..65535, held as int32, as float16; float32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3(byte):
    """Read bytes 0..255, held as int32, as float8 e4m3, float32. NaN becomes 480: slots without a token may hold it."""
    # Shifted to the fields of a float16 the number is 2**8 times too small: the exponents' biases are 7 and 15.
    return float16_bits(((byte & 0x80) << 8) | ((byte & 0x7F) << 7)) * 256.0


@triton.jit
def capped(logits, scale, softcap, SOFTCAP: tl.constexpr, ASM: tl.constexpr):
    """Scale logits, cap them if asked to, and turn them into logarithms of base 2."""
    if SOFTCAP:
        x = logits * (scale / softcap)
        grown = exp2(tl.minimum(x * 2.8853900817779268, 126.0), ASM)
        # Near 0 the digits of 1 - 2 / (1 + e**2x) cancel; a series has them.
        square = x * x
        series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        tanh = tl.where(square < 0.0625, series, 1.0 - 2.0 / (grown + 1.0))
        logits = tanh * (softcap * 1.4426950408889634)
    else:
        logits = logits * (scale * 1.4426950408889634)
    return logits
