"""How the Triton kernels see a pool of packed pages: word-sized views, strides and padded sizes."""

import dataclasses
import math

import torch
import triton

from .dispatch import takes
from .page_codes import BITS, FP8_MAX, PageCodes

#: Subtracted from codes, so that the rounding of what multiplies them is that of the decoded tokens.
CENTRES = {"none": 0, "fp8": 0, "int8": 128, "int4": 8, "int2": 2}

#: Query heads that a program takes at least: columns of a dot, which Triton padded to 16 before version 3.5.
MIN_HEADS = 8 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5) else 16


@dataclasses.dataclass(frozen=True, slots=True)
class PoolOperands:
    """The tensors of a :class:`PageCodes` as the kernels read them.

    Attributes
    ----------
    tensors : tuple
        Codes and spread as int16 words of two channels, floor as words of two channels, outliers as int64, fine as
        int32, latent; None where there are none.
    pages : int
        Pages from one head to the next.
    """

    tensors: tuple[torch.Tensor | None, ...]
    pages: int


def pool_operands(pages: PageCodes, floor_dtype: torch.dtype) -> PoolOperands:
    """Return the operands of a pool.

    Raises
    ------
    ValueError
        If pages are not contiguous, or coded channels not even in number and 16 at least.
    TypeError
        If the floors are not of keys, or of values, as `floor_dtype` says.
    """
    coded = pages.kind != "none"
    if coded and not takes(pages.dim):
        raise ValueError(f"Triton's kernels take an even number of at least 16 coded channels, not {pages.dim}")
    if pages.floor is not None and pages.floor.dtype != floor_dtype:
        raise TypeError(f"floors of dtype {pages.floor.dtype} where {floor_dtype} was expected: keys for values?")
    strides = {_pages_per_head(tensor) for tensor in pages.tensors()} if pages.pages else {0}
    if len(strides) > 1:
        raise ValueError(f"tensors of one pool with different numbers of pages per head: {sorted(strides)}")
    return PoolOperands(
        (
            pages.codes.view(torch.int16) if coded else pages.codes,
            None if pages.spread is None else pages.spread.view(torch.int16),
            None if pages.floor is None else pages.floor.view(_WORDS[floor_dtype]),
            None if pages.outliers is None else pages.outliers.view(torch.int64),
            None if pages.fine is None else pages.fine.view(torch.int32),
            pages.latent,
        ),
        strides.pop(),
    )


_WORDS = {torch.float16: torch.int32, torch.int8: torch.int16}


def _pages_per_head(tensor: torch.Tensor) -> int:
    head = tensor.select(0, 0)
    page = head.numel() // tensor.shape[1]
    if not head.is_contiguous() or tensor.stride(0) % page:
        raise ValueError(f"a pool of shape {tuple(tensor.shape)} has strides {tensor.stride()}: pages not contiguous")
    return tensor.stride(0) // page if tensor.shape[0] > 1 else 0


def layout(pages: PageCodes) -> tuple[int, int, int, float]:
    """Return bits per code, rows of codes, rows that are multiplied at once and the logarithm of the levels.

    Tensor cores multiply 16 rows at least; a page that has fewer, or a number that is no power of two, is read with
    repetitions.
    """
    bits = BITS.get(pages.kind, 8)
    rows = pages.codes.shape[2]
    tokens = block_tokens(pages.page_size)
    tile = max(16, rows) if tokens == pages.page_size else tokens
    levels = FP8_MAX if pages.kind == "fp8" else 2**bits - 1
    return bits, rows, tile, math.log2(levels)


def block_tokens(page_size: int) -> int:
    """Return the tokens of a page as the kernels pad them."""
    return max(16, power_of_2(page_size))


def block_channels(dim: int) -> int:
    """Return half the channels of a page as the kernels pad them."""
    return max(16, power_of_2((dim + 1) // 2))


def power_of_2(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()
