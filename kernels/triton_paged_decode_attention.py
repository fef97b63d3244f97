"""Triton version of :func:`.paged_decode_attention.paged_decode_attention`."""

import triton
import triton.language as tl

from .triton_basics import exp2, high_byte, low_byte, row_max, row_sum, signed, spread_value, stack, unstack
from .triton_unpack import unpack


@triton.jit
def _load_dense(codes, page, first, count, t, c, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """Load channels `first..first + C - 1` of a page of kind "none", 0 in slots that hold no token."""
    d = first + c
    return tl.load(
        codes + page * (P * D) + t[:, None] * D + d[None, :],
        mask=(t[:, None] < count) & (c[None, :] < C) & (d[None, :] < D),
        other=0.0,
    ).to(dtype)


@triton.jit
def _load_words(codes, page, t, c, ROWS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Load the words of codes of tokens t and t + len(t), t + 2 * len(t), ..., lowest bits first."""
    words = tl.load(
        codes + page * (ROWS * C) + (t % ROWS)[:, None] * C + c[None, :], mask=c[None, :] < C, other=0
    )
    if t.shape[0] > ROWS:
        # Rows too few for an operand are repeated, shifted so that repetitions hold the next tokens.
        words = words >> ((t // ROWS) % (8 // BITS) * BITS).to(tl.int16)[:, None]
    return words


@triton.jit
def _key_plane(words, q0, q1, start, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, ASM: tl.constexpr):
    even, odd = unpack(words, SHIFT, KIND, CENTRE, q0.dtype, ASM)
    logits = tl.dot(even, q0, start, input_precision="ieee")
    return tl.dot(odd, q1, logits, input_precision="ieee")


@triton.jit
def _key_planes(
    words, q0, q1, PLANES: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr,
    EXCESS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the products of a page's codes with the query, `(tokens, BLOCK_G)`."""
    start = tl.full((words.shape[0], q0.shape[1]), 0.0, tl.float32)
    if EXCESS != 0:
        # Tensor cores sum in float32, so that subtracting the excess leaves no trace.
        most = tl.full((words.shape[0], words.shape[1]), -EXCESS, q0.dtype)
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
    words, p, even_sum, odd_sum, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr, EXCESS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    even, odd = unpack(words, SHIFT, KIND, CENTRE, p.dtype, ASM)
    if EXCESS != 0:
        most = tl.full((words.shape[1], words.shape[0]), -EXCESS, p.dtype)
        even_sum = tl.dot(most, p, even_sum)
        odd_sum = tl.dot(most, p, odd_sum)
    even_sum = tl.dot(tl.trans(even), p, even_sum, input_precision="ieee")
    odd_sum = tl.dot(tl.trans(odd), p, odd_sum, input_precision="ieee")
    return even_sum, odd_sum


@triton.jit
def _value_planes(
    words, p, PLANES: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, CENTRE: tl.constexpr,
    EXCESS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the sums of a page's codes with weights `(tokens, BLOCK_G)`, `(channels / 2, BLOCK_G)` each."""
    even = tl.full((words.shape[1], p.shape[1]), 0.0, tl.float32)
    odd = even
    if PLANES == 1:
        even, odd = _value_plane(words, p, even, odd, 0, KIND, CENTRE, EXCESS, ASM)
    elif PLANES == 2:
        p0, p1 = unstack(p)
        even, odd = _value_plane(words, p0, even, odd, 0, KIND, CENTRE, EXCESS, ASM)
        even, odd = _value_plane(words, p1, even, odd, SHIFT, KIND, CENTRE, EXCESS, ASM)
    else:
        low, high = unstack(p)
        p0, p1 = unstack(low)
        p2, p3 = unstack(high)
        even, odd = _value_plane(words, p0, even, odd, 0, KIND, CENTRE, EXCESS, ASM)
        even, odd = _value_plane(words, p1, even, odd, SHIFT, KIND, CENTRE, EXCESS, ASM)
        even, odd = _value_plane(words, p2, even, odd, 2 * SHIFT, KIND, CENTRE, EXCESS, ASM)
        even, odd = _value_plane(words, p3, even, odd, 3 * SHIFT, KIND, CENTRE, EXCESS, ASM)
    return even, odd
