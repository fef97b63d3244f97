"""K/V assigned from outside: what was handed out, and what an assignment made of it."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class HandedOut:
    """A dense tensor that a layer has given away, remembered without keeping it alive.

    A slice of it that comes back is a shorter cache, whose tokens need not be stored again. Only a slice of the very
    memory, unwritten since, counts: equal numbers elsewhere would have to be compared one by one.

    Parameters
    ----------
    tensor : torch.Tensor
        `(B, H, T, D)`.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = tensor.stride(), tensor.storage_offset()
        self._shape = tensor.shape
        self._version = _version(tensor)

    def is_prefix(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is `handed_out[:, :, :n]`, unchanged."""
        batch, heads, tokens, dim = self._shape
        return (
            self._version is not None
            and _version(tensor) == self._version
            and tensor.shape[2] <= tokens
            and tensor.shape == (batch, heads, tensor.shape[2], dim)
            and (tensor.stride(), tensor.storage_offset()) == self._layout
            # As long as this reference lives, the address is not given to another storage.
            and StorageWeakRef(tensor.untyped_storage()).cdata == self._storage.cdata
        )


def _version(tensor: torch.Tensor) -> int | None:
    # Tensors made in inference mode do not count their changes.
    return None if tensor.is_inference() else tensor._version


def is_selection(keys: torch.Tensor, old_keys: torch.Tensor) -> bool:
    """Return whether keys were only picked from the old ones, so that their rotations are still those of old positions.

    Channels may have been set to zero, as ThinK does: of all tokens, or of some where none was left out. Keys that were
    rotated to new positions are no selection.

    Parameters
    ----------
    keys, old_keys : torch.Tensor
        `(B, H, n, D)` and `(B, H, T, D)`.
    """
    if keys.shape == old_keys.shape and bool(((keys == old_keys) | (keys == 0)).all()):
        return True
    empty = (keys == 0).all(dim=2, keepdim=True)
    if bool(empty.all(dim=-1).any()):
        return False
    new, old = (token_hashes(part.masked_fill(empty, 0)).contiguous() for part in (keys, old_keys))
    known = old.sort(dim=-1).values
    place = torch.searchsorted(known, new).clamp_max_(known.shape[-1] - 1)
    return bool((known.gather(-1, place) == new).all())


def token_hashes(tokens: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit number per token, `(B, H, T)`, equal for equal bits."""
    words = tokens.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tokens.element_size()])
    generator = torch.Generator().manual_seed(0x5EED)
    factors = torch.randint(-(2**62), 2**62, (words.shape[-1],), generator=generator).to(words.device) | 1
    return (words.long() * factors).sum(dim=-1)
