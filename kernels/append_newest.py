"""Writing the newest token of each row, with its position, into its page slot."""

import functools
from collections.abc import Callable

import torch

from .dispatch import choose, load, run


def newest_writer(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> Callable[[int, torch.Tensor, torch.Tensor, int], None]:
    """Return what writes one token per row into a pool, in place: `write(offset, keys, values, position)`.

    It is made for as many steps as there is room; what does not change in them is known to it.

    Parameters
    ----------
    key_pages, value_pages : torch.Tensor
        `(H, N, P, D)` and `(H, N, P, Dv)`, the pool; pages contiguous and side by side.
    positions : torch.Tensor
        `(N, P)` int32, contiguous.
    slots : torch.Tensor
        `(B,)` int64, `page * P + offset` of a slot of each row, without repetition.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    callable
        `offset` says how many slots behind that the row's token goes, not below 0. `keys` and `values` are
        `(B, H, 1, D)` and `(B, H, 1, Dv)` of the pool's dtype, with any strides, and `position` is that of all of them.
        It raises `ValueError` for other shapes or another device, and `TypeError` for another dtype.

    Raises
    ------
    ValueError
        If the pool is not contiguous: what would be written to might be a copy.
    """
    pool = key_pages, value_pages, positions
    for pages in (key_pages, value_pages, positions[None, ..., None]):
        _, _, size, dim = pages.shape
        if pages.stride()[1:] != (size * dim, dim, 1):
            raise ValueError(f"a pool of shape {tuple(pages.shape)} has strides {pages.stride()}: pages not contiguous")
    how = choose(key_pages.device, backend, compiled=key_pages.dtype == value_pages.dtype)
    if how == "numba":
        write: Callable[[int, torch.Tensor, torch.Tensor, int], None] = load("append_newest", how).Writer(*pool, slots)
    elif how == "torch":
        flat = key_pages.flatten(1, 2), value_pages.flatten(1, 2), positions.view(-1)
        write = functools.partial(_write, *flat, slots)
    else:
        write = functools.partial(run, "append_newest", how, key_pages.device, *pool, slots)
    (heads, _, _, dim), value_dim, rows = key_pages.shape, value_pages.shape[-1], len(slots)
    shapes, device = ((rows, heads, 1, dim), (rows, heads, 1, value_dim)), key_pages.device
    key_dtype, value_dtype = key_pages.dtype, value_pages.dtype

    def checked(offset: int, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        if (keys.shape, values.shape) != shapes or keys.device != device or values.device != device:
            got = f"{tuple(keys.shape)} on {keys.device} and {tuple(values.shape)} on {values.device}"
            raise ValueError(f"tokens {got} for {rows} slots of a pool {tuple(key_pages.shape)} on {device}")
        if keys.dtype != key_dtype or values.dtype != value_dtype:
            got = f"{keys.dtype} and {values.dtype}"
            raise TypeError(f"tokens of {got} for a pool of {key_dtype} and {value_dtype}")
        write(offset, keys, values, position)

    return checked


def expert_writer(
    experts: torch.Tensor, slots: torch.Tensor, *, backend: str | None = None
) -> Callable[[int, torch.Tensor], None]:
    """Return what notes the experts of tokens that :func:`newest_writer` has written: `note(offset, chosen)`.

    Parameters
    ----------
    experts : torch.Tensor
        `(N, P)` int16, contiguous.
    slots : torch.Tensor
        `(B,)` int64, as there.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`; Triton has no version of its own.

    Returns
    -------
    callable
        `chosen` is `(B,)` integers, or `(B / n,)` if each is of n slots that follow each other. It raises `ValueError`
        for another shape or device.
    """
    how = choose(experts.device, backend, compiled=True)
    if how == "numba":
        note: Callable[[int, torch.Tensor], None] = load("append_newest", how).ExpertWriter(experts, slots)
    else:
        note = functools.partial(_write_experts, experts.view(-1), slots)
    rows, device = len(slots), experts.device

    def checked(offset: int, chosen: torch.Tensor) -> None:
        if not rows and not chosen.numel():
            return
        if chosen.ndim != 1 or not len(chosen) or rows % len(chosen) or chosen.device != device:
            raise ValueError(f"experts {tuple(chosen.shape)} on {chosen.device} for {rows} slots on {device}")
        note(offset, chosen)

    return checked


def append_newest(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    *,
    backend: str | None = None,
) -> None:
    """Write one token per row into a pool, in place; see :func:`newest_writer`, which serves several steps."""
    newest_writer(key_pages, value_pages, positions, slots, backend=backend)(offset, keys, values, position)


def _write(
    all_keys: torch.Tensor,
    all_values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
) -> None:
    """Write to a pool whose slots are one after the other, `(H, N * P, D)`, `(H, N * P, Dv)` and `(N * P,)`."""
    for stored, tokens in ((all_keys, keys), (all_values, values)):
        stored[:, offset:].index_copy_(1, slots, tokens.squeeze(2).transpose(0, 1))
    positions[offset:].index_fill_(0, slots, position)


def _write_experts(experts: torch.Tensor, slots: torch.Tensor, offset: int, chosen: torch.Tensor) -> None:
    chosen = chosen.to(experts.dtype)
    if len(chosen) != len(slots):
        chosen = chosen.repeat_interleave(len(slots) // len(chosen))
    experts[offset:].index_copy_(0, slots, chosen)
