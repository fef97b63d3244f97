"""Transformers' own sliding-window layers beside paged ones: what is checked, trimmed and copied of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..common.tensors import detached, is_out_of_memory
from ..pages.pool_growth import MAX_FREE
from .input_checks import KVFormat


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


@contextmanager
def undone_on_error(layer: CacheLayerMixin) -> Iterator[None]:
    """Undo what the block does to a layer of transformers if it raises: such layers never write into their tensors."""
    before = dict(vars(layer))
    try:
        yield
    except BaseException:
        vars(layer).clear()
        vars(layer).update(before)
        raise


def is_recording(layer: Any) -> bool:
    """Return whether a layer of transformers keeps what has left its window until the next crop, whatever its length.

    Assisted decoding asks for that from 5.24 on.
    """
    return bool(getattr(layer, "record_past", False))


def check_can_crop(index: int, layer: DynamicSlidingWindowLayer, length: int) -> None:
    """Raise `ValueError` if sliding layer `index` has already let go of tokens that a crop to `length` would need."""
    seen, kept = layer.get_seq_length(), layer.keys.shape[2]
    if kept - (seen - length) < min(length, layer.sliding_window - 1):
        raise ValueError(
            f"cannot crop to {length} of {seen} tokens: layer {index} only kept the last {kept}; "
            'sliding_layers="paged" keeps all, as assisted decoding needs'
        )


def copy_sliding(layer: DynamicSlidingWindowLayer) -> DynamicSlidingWindowLayer:
    """Copy a sliding layer; it never writes into its tensors, so that both may use the same."""
    twin = DynamicSlidingWindowLayer.__new__(DynamicSlidingWindowLayer)
    twin.__dict__.update(layer.__dict__)
    return twin


def take_over(layer: DynamicSlidingWindowLayer, other: DynamicSlidingWindowLayer) -> None:
    """Give an empty sliding layer the tokens of another, which both never write into."""
    layer.lazy_initialization(other.keys, other.values)
    layer.keys, layer.values, layer.cumulative_length = other.keys, other.values, other.cumulative_length
