"""Tensors that travel between devices."""

import torch


def carried(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, itself if it is there.

    Work on an accelerator that needs it waits for it, not the caller. A CPU does not wait by itself: it would read
    what has not arrived.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")
