"""Packing integers of 8, 4 or 2 bits into bytes, and unpacking them: int8, int4 and int2 pages."""

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers `(..., P, D)` of `bits` bits into bytes `(..., R, D)`; see :class:`~.page_codes.PageCodes`."""
    per_byte = 8 // bits
    rows = (codes.shape[-2] + per_byte - 1) // per_byte
    missing = rows * per_byte - codes.shape[-2]
    planes = torch.nn.functional.pad(codes.to(torch.uint8), (0, 0, 0, missing)).unflatten(-2, (per_byte, rows))
    packed = planes.select(-3, 0).clone()
    for plane in range(1, per_byte):
        packed |= planes.select(-3, plane) << (plane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, page_size: int) -> torch.Tensor:
    """Undo :func:`pack`: uint8 `(..., R, D)` into uint8 `(..., P, D)`."""
    planes = [(packed >> (plane * bits)) & (2**bits - 1) for plane in range(8 // bits)]
    return torch.cat(planes, dim=-2)[..., :page_size, :]
