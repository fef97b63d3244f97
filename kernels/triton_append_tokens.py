# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.append_tokens.append_tokens`."""

import torch
import triton
import triton.language as tl

BLOCK_T = 16


@triton.jit
def _append_kernel(
    pages, slots, tokens, count, head_stride, token_head, token_stride, channel_stride,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    mask = (n < count)[:, None] & (d < D)[None, :]
    slot = tl.load(slots + n, mask=n < count, other=0).to(tl.int64)
    source = tokens + head * token_head + n.to(tl.int64)[:, None] * token_stride + d[None, :] * channel_stride
    rows = tl.load(source, mask=mask, other=0)
    tl.store(pages + head * head_stride + slot[:, None] * D + d[None, :], rows, mask=mask)


def append_tokens(pages: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Launch the kernel; see the public function."""
    heads, page_count, size, dim = pages.shape
    count = slots.shape[0]
    if not pages.view(heads, page_count * size, dim).stride()[1:] == (dim, 1):
        raise ValueError(f"a pool of shape {tuple(pages.shape)} has strides {pages.stride()}: pages not contiguous")
    if count and heads:
        _append_kernel[(triton.cdiv(count, BLOCK_T), heads)](
            pages, slots.contiguous(), tokens, count, pages.stride(0), *tokens.stride(),
            D=dim, BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(dim),
        )  # fmt: skip
