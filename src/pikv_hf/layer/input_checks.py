"""Refusing K/V that are malformed or do not fit what a layer holds."""

from typing import NamedTuple

import torch


class KVFormat(NamedTuple):
    """What all K/V of a layer have in common.

    Attributes
    ----------
    shape : tuple of int
        `(B, H, D, Dv)`.
    dtype : torch.dtype
        Of keys and values.
    device : torch.device
        Where the layer's attention computes.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "KVFormat":
        """Return the format of K/V `(B, H, Q, D)` and `(B, H, Q, Dv)`."""
        batch, heads, _, dim = keys.shape
        return cls((batch, heads, dim, values.shape[-1]), keys.dtype, keys.device)


def check_fits(layer_idx: int, keys: torch.Tensor, values: torch.Tensor, stored: KVFormat | None) -> None:
    """Raise unless new K/V are well-formed and fit what a layer holds.

    Parameters
    ----------
    layer_idx : int
        For the message.
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`.
    stored : KVFormat, optional
        What is stored already.

    Raises
    ------
    ValueError, RuntimeError
        For K/V of other shapes, dtypes or devices, or that require gradients.
    """
    where = f"layer {layer_idx}"
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"{where}: keys and values must be (batch, heads, tokens, head_dim) with equal first three sizes, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(f"{where}: keys are {keys.dtype} on {keys.device}, values {values.dtype} on {values.device}")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise RuntimeError(
            f"{where}: K/V require gradients, which this cache does not keep; "
            "call the model under torch.no_grad() or train without past_key_values"
        )
    if stored is None:
        return
    shape, dtype, device = stored
    if (new := (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])) != shape:
        raise ValueError(
            f"{where}: got K/V with (batch, heads, key dim, value dim) = {new}, but the cache holds {shape}; "
            "a cache serves one model and one batch until reset()"
        )
    if (keys.dtype, keys.device) != (dtype, device):
        raise ValueError(f"{where}: got {keys.dtype} on {keys.device}, but the cache holds {dtype} on {device}")
