"""What a layer refuses, and how a crop is meant."""

import torch
import transformers
from packaging.version import Version

KVFormat = tuple[tuple[int, int, int, int], torch.dtype, torch.device]


def check_fits(layer_idx: int, keys: torch.Tensor, values: torch.Tensor, held: KVFormat | None) -> None:
    """Raise unless new K/V are well-formed and fit what a layer holds.

    Parameters
    ----------
    layer_idx : int
        For the message.
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`.
    held : tuple, optional
        `(B, H, D, Dv)`, dtype and device of what is stored.
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
    if held is None:
        return
    shape, dtype, device = held
    if (new := (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])) != shape:
        raise ValueError(
            f"{where}: got K/V with (batch, heads, key dim, value dim) = {new}, but the cache holds {shape}; "
            "a cache serves one model and one batch until reset()"
        )
    if (keys.dtype, keys.device) != (dtype, device):
        raise ValueError(f"{where}: got {keys.dtype} on {keys.device}, but the cache holds {dtype} on {device}")


# Up to 5.17 `crop(0)` keeps nothing, from 5.18 on it removes nothing.
_ZERO_REMOVES_NOTHING = Version(transformers.__version__) >= Version("5.18.0.dev0")


def cropped_length(seen: int, argument: int) -> int:
    """Return how many of `seen` positions `crop(argument)` keeps.

    A negative argument is a number of tokens to remove, which all releases of transformers agree on. A positive one is
    the length to keep, as up to 5.17; zero means what the installed release means by it.
    """
    if argument < 0 or (argument == 0 and _ZERO_REMOVES_NOTHING):
        return max(0, seen + argument)
    return min(seen, argument)
