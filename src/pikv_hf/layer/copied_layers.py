"""Filling the layers of a new cache with the tokens of another cache."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .indexed_layer import IndexedLayer
from .layer import PiKVLayer
from .own_layer import copied, has_positions, indexer_keys_of, is_indexed
from .sliding_layer import take_over, update_sliding


def copy_layers(source: Cache, layers: Sequence[Any]) -> None:
    """Fill empty layers, paged or sliding, with the tokens of another cache, which stays as it is.

    Raises
    ------
    TypeError, ValueError
        For what is no cache of full and sliding layers, for another number of layers or layers of other lengths or
        windows, and where tokens are gone; nothing has changed then.
    """
    if not isinstance(source, Cache) or not hasattr(source, "layers"):
        raise TypeError(f"expected a cache of transformers with layers, got {type(source).__name__}")
    pairs = list(zip(layers, source.layers, strict=False))
    counting = sum(map(has_positions, layers))
    lengths = [_length(other) for _, other in pairs if has_positions(other)]
    if not any(lengths):
        return
    if len(source.layers) != len(layers) or len(lengths) != counting or not all(lengths):
        raise ValueError(
            f"the {type(source).__name__} has {len(source.layers)} layers, {sum(map(bool, lengths))} of them with "
            f"tokens, but the model's cache has {len(layers)}, {counting} of them for tokens"
        )
    if len(different := sorted(set(lengths))) > 1:
        raise ValueError(f"layers of the {type(source).__name__} have different lengths: {different}")
    for index, (layer, other) in enumerate(pairs):
        _check_copies(index, layer, other)
    for layer, other in pairs:
        _copy(layer, other)


def _length(layer: Any) -> int:
    return int(layer.get_seq_length())


def _check_copies(index: int, layer: Any, other: Any) -> None:
    """Raise unless all tokens that a layer needs are in another."""
    kind = type(other)
    if not has_positions(layer) and kind is type(layer):
        return
    paged = isinstance(other, PiKVLayer)
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer) and not paged and not is_indexed(other):
        raise TypeError(
            f"layer {index} is of type {kind.__name__}; PiKVCache can copy those of DynamicCache and its own"
        )
    if isinstance(layer, IndexedLayer) and indexer_keys_of(other) is None:
        raise TypeError(f"layer {index} needs the keys of an indexer, which those of type {kind.__name__} lack")
    if paged and other.state.evicted:
        raise ValueError(f"layer {index}: tokens were evicted, and which ones dense K/V do not tell")
    if paged and other.state.assigned:
        raise ValueError(
            f"layer {index}: {other.state.assigned} tokens were assigned from outside, and their positions are not "
            "known; use cache.fork()"
        )
    if paged and other.store.is_padded:
        raise ValueError(f"layer {index}: rows are padded, and padding was not stored; use cache.fork()")
    if kind is not DynamicSlidingWindowLayer:
        return
    held = other.keys.shape[2]
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window != other.sliding_window:
        raise ValueError(
            f"layer {index} slides over {other.sliding_window} tokens, that of the model over {layer.sliding_window}"
        )
    if isinstance(layer, PiKVLayer) and held < _length(other):
        raise ValueError(
            f'layer {index} has kept {held} of {_length(other)} tokens, all of which sliding_layers="paged" would need'
        )


def _copy(layer: Any, other: Any) -> None:
    if not has_positions(layer):
        vars(layer).update(vars(copied(other)))
        return
    if isinstance(layer, DynamicSlidingWindowLayer) and isinstance(other, DynamicSlidingWindowLayer):
        take_over(layer, other)
        return
    keys, values = other.keys.detach(), other.values.detach()
    if isinstance(layer, PiKVLayer):
        layer.update_from_outside(keys, values)
        if isinstance(layer, IndexedLayer) and (indexer_keys := indexer_keys_of(other)) is not None:
            layer.update_indexer(indexer_keys)
            layer.settle()
    else:
        update_sliding(layer, keys, values)
