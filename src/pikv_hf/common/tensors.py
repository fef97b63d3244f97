"""Tensors: moved between devices, extended, and the bytes that they take."""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, itself if it is there.

    Work on an accelerator that needs it waits for it, not the caller. A CPU does not wait by itself: it would read
    what has not arrived.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the graph of autograd, itself if it has none."""
    return tensor.detach() if tensor.requires_grad else tensor


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which attention computes with a tensor: its own, unless autocast gives another."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def resized(tensor: torch.Tensor, size: int, dim: int, kept: torch.Tensor | int) -> torch.Tensor:
    """Return a copy of a pool's tensor with `size` entries along dimension 0 or 1.

    They are those at `kept` `(n,)` int64, or the first `kept`; then zeros.
    """
    shape = list(tensor.shape)
    shape[dim] = size
    # Zeros, not empty memory: a slot without a token is masked, and 0 * NaN would still be NaN.
    copy = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(kept, int):
        copy.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
        return copy
    # Head by head: what is picked goes straight to its place.
    for target, source in zip(copy, tensor, strict=True) if dim else [(copy, tensor)]:
        torch.index_select(source, 0, kept, out=target[: len(kept)])
    return copy


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is lacking: on a CPU torch raises a `RuntimeError` for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def live_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind tensors: a view costs what it keeps alive."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def has_no_data(tensor: object) -> bool:
    """Return whether something is a tensor of a shape alone: on the meta device, or of torch's `FakeTensorMode`."""
    return isinstance(tensor, torch.Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor))
