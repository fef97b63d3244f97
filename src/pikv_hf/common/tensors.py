"""Tensors: moved between devices, extended, and the bytes that they take."""

from collections.abc import Iterable

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, itself if it is there.

    Work on an accelerator that needs it waits for it, not the caller. A CPU does not wait by itself: it would read
    what has not arrived.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")


def extended(tensor: torch.Tensor, extra: int, dim: int) -> torch.Tensor:
    """Return a copy of a pool's tensor with `extra` more entries, zeros, along a dimension."""
    shape = list(tensor.shape)
    shape[dim] += extra
    # Zeros, not empty memory: a slot without a token is masked, and 0 * NaN would still be NaN.
    grown = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def live_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind tensors: a view costs what it keeps alive."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
