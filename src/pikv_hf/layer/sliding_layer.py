"""Transformers' own sliding-window layers beside paged ones: taking tokens in, and freeing what they let go of."""

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..common.tensors import detached, is_out_of_memory
from ..pages.pool_growth import MAX_FREE
from .input_checks import KVFormat
from .own_layer import is_recording, undone_on_error


def kv_format(layer: DynamicSlidingWindowLayer) -> KVFormat | None:
    """Return what new K/V of a sliding layer must be like, None before the first."""
    if not layer.is_initialized or not layer.keys.numel():
        return None
    return KVFormat.of(layer.keys, layer.values)


def update_sliding(
    layer: DynamicSlidingWindowLayer, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a sliding layer have new K/V, and return with them those that it held, as transformers does."""
    with undone_on_error(layer):
        if kv_format(layer) is None:
            # Cropped to nothing it would go on to insist on its rows.
            layer.lazy_initialization(keys, values)
        result = layer.update(keys, values)
        _trim_to_window(layer)
    return result


def _trim_to_window(layer: DynamicSlidingWindowLayer) -> None:
    """Free what a sliding layer holds beyond its window, and the graph of autograd that its tensors may have.

    transformers keeps a view of all that a call brought.
    """
    for name in ("keys", "values"):
        kept = detached(getattr(layer, name))
        setattr(layer, name, kept)
        window = kept[:, :, :1].numel() * kept.element_size() * layer.sliding_window
        if kept.untyped_storage().nbytes() > window and not is_recording(layer):
            setattr(layer, name, kept.clone())


def trim_to_tokens(layer: DynamicSlidingWindowLayer) -> None:
    """Free what a sliding layer has let go of, where that is more than a fifth: a crop leaves views.

    Where memory for the copies is lacking the views stay.
    """
    for name in ("keys", "values") if layer.is_initialized else ():
        kept: torch.Tensor = getattr(layer, name)
        if kept.untyped_storage().nbytes() > (1 + MAX_FREE) * kept.numel() * kept.element_size():
            try:
                setattr(layer, name, kept.clone())
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise


def take_over(layer: DynamicSlidingWindowLayer, other: DynamicSlidingWindowLayer) -> None:
    """Give an empty sliding layer the tokens of another, which both never write into."""
    layer.lazy_initialization(other.keys, other.values)
    layer.keys, layer.values, layer.cumulative_length = other.keys, other.values, other.cumulative_length
