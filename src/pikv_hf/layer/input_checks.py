"""What K/V a layer takes, and in which dtype; those that are malformed or do not fit what it holds are refused."""

import functools
import warnings
from typing import NamedTuple, NoReturn

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ..common.tensors import autocast_dtype
from ..common.user_line import user_stacklevel
from .model_link import ModelLink


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

    def with_indexer(self, channels: int) -> "KVFormat":
        """Return the format with room for so many channels of indexer keys, divided among the heads."""
        batch, heads, dim, value_dim = self.shape
        return self._replace(shape=(batch, heads, dim, value_dim - (-channels // heads)))


def admit(
    layer_idx: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    stored: KVFormat | None,
    link: ModelLink | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new K/V in the dtype in which a layer stores them, or refuse them before anything has changed.

    Parameters
    ----------
    layer_idx : int
        Of the layer.
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`.
    stored : KVFormat, optional
        What is stored already.
    link : ModelLink, optional
        The attached model.

    Raises
    ------
    ValueError
        For K/V of other shapes, dtypes or devices than what is stored, without data, inside of a transform of
        `torch.func`, and for K/V that require gradients while the attached model is being trained.
    """
    where = f"layer {layer_idx}"
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"{where}: keys and values must be (batch, heads, tokens, head_dim) with equal first three sizes, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if forward_ad._current_level >= 0 or is_functorch_wrapped_tensor(keys) or is_functorch_wrapped_tensor(values):
        raise ValueError(
            f"{where}: the call is inside a transform of torch.func (vmap, grad, jvp, ...) or forward-mode "
            "differentiation, and pages cannot store what belongs to one; use a DynamicCache there"
        )
    if keys.is_meta or values.is_meta or isinstance(keys, FakeTensor) or isinstance(values, FakeTensor):
        raise ValueError(
            f"{where}: keys and values have shapes and no data (FakeTensorMode, or the meta device), and pages store "
            "data; use a DynamicCache there, or `pikv plan` for how much memory a PiKVCache will take"
        )
    if torch._C._is_any_autocast_enabled():
        keys, values = as_stored(keys, values, None if stored is None else stored.dtype)
    if keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(f"{where}: keys are {keys.dtype} on {keys.device}, values {values.dtype} on {values.device}")
    if stored is not None:
        (batch, heads, dim, value_dim), dtype, device = stored
        fits = keys.shape == (batch, heads, keys.shape[2], dim) and values.shape[3] == value_dim
        if not fits or keys.dtype != dtype or keys.device != device:
            _refuse(where, KVFormat.of(keys, values), stored)
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        _check_detachable(layer_idx, link)
    return keys, values


def _refuse(where: str, new: KVFormat, stored: KVFormat) -> NoReturn:
    """Refuse K/V of another format than what is stored."""
    if new.shape != stored.shape:
        raise ValueError(
            f"{where}: got K/V with (batch, heads, key dim, value dim) = {new.shape}, but the cache holds "
            f"{stored.shape}; a cache serves one model and one batch until reset()"
        )
    raise ValueError(f"{where}: got {new.dtype} on {new.device}, but the cache holds {stored.dtype} on {stored.device}")


def _check_detachable(layer_idx: int, link: ModelLink | None) -> None:
    """Refuse K/V that require gradients in training; else warn that gradients end where tokens are stored."""
    if link is not None and link.is_training(layer_idx):
        raise ValueError(
            f"layer {layer_idx}: the model is in training mode and its K/V require gradients, which do not reach "
            "stored tokens; train without a cache (use_cache=False), or call model.eval() to have gradients for the "
            "tokens of each call alone"
        )
    warn_detached()


@functools.cache
def warn_detached() -> None:
    """Warn, once in a process, that gradients end at stored tokens."""
    warnings.warn(
        "A PiKVCache stores tokens detached: a backward pass reaches the tokens of its own call, not those that "
        "earlier calls have stored. Call the model under torch.no_grad() where no gradients are wanted. (Said once.)",
        stacklevel=user_stacklevel(),
    )


def as_stored(
    keys: torch.Tensor, values: torch.Tensor, stored: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K/V as a layer stores them under autocast; outside of it, as they are.

    Attention rounds them to autocast's dtype whatever they are, often keys in float32 beside values in bfloat16. So
    that is how they are stored, unless the layer holds wider ones from outside of autocast: then they are widened.
    """
    if not torch.is_autocast_enabled(keys.device.type):
        return keys, values
    rounded = autocast_dtype(keys)
    if stored is None or stored == rounded:
        return keys.to(rounded), values.to(rounded)
    wide = torch.promote_types(torch.promote_types(keys.dtype, values.dtype), stored)
    return keys.to(wide), values.to(wide)


def check_not_padded(layer_idx: int, padded: bool) -> None:
    """Raise `ValueError` if padding was left out, which no attention but PiKV's knows of."""
    if padded:
        raise ValueError(
            f"layer {layer_idx}: rows of this cache are padded, and padding is not stored; only an attached model's "
            "attention shows what its masks hide. Attach the model again: pikv_hf.attach(model)"
        )
