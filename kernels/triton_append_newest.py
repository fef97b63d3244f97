# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.append_newest.append_newest`: one launch for keys, values and positions."""

import torch
import triton
import triton.language as tl


@triton.jit
def _copy(tokens, pages, channel_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(pages + d, tl.load(tokens + d * channel_stride, mask=d < D, other=0), mask=d < D)


@triton.jit(
    do_not_specialize=[
        *("offset", "position", "key_pool_head", "value_pool_head"),
        *("key_row", "key_head", "value_row", "value_head"),
    ]
)
def _append_newest_kernel(
    key_pages, value_pages, positions, slots, keys, values, offset, position, key_pool_head, value_pool_head,
    key_row, key_head, key_channel, value_row, value_head, value_channel,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row) + offset
    _copy(keys + row * key_row + head * key_head, key_pages + head * key_pool_head + slot * D, key_channel, D, BLOCK_D)
    _copy(
        values + row * value_row + head * value_head,
        value_pages + head * value_pool_head + slot * DV,
        value_channel, DV, BLOCK_DV,
    )  # fmt: skip
    tl.store(positions + slot, position, mask=head == 0)


def append_newest(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
) -> None:
    """Launch the kernel; see the public function."""
    batch, heads = keys.shape[:2]
    if batch and heads:
        dims = keys.shape[3], values.shape[3]
        _append_newest_kernel[(batch, heads)](
            key_pages, value_pages, positions, slots, keys, values, offset, position,
            key_pages.stride(0), value_pages.stride(0),
            keys.stride(0), keys.stride(1), keys.stride(3), values.stride(0), values.stride(1), values.stride(3),
            D=dims[0], BLOCK_D=triton.next_power_of_2(dims[0]), DV=dims[1], BLOCK_DV=triton.next_power_of_2(dims[1]),
        )  # fmt: skip
