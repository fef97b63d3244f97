"""Layers that stay transformers' own beside paged ones: sliding windows, linear attention, convolutions, or none.

Sliding windows and convolutions never write into their tensors, so that copies may share them. Linear attention writes
its states in place. Where a release lacks one of these kinds, no layer is of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..common.transformers_release import INSTALLED, config_of_layer

#: With states that every call changes, beside K/V or without.
_STATE_LAYER: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
#: What a layer may be, beside full attention, which is paged. `DummyLayer` is that of a layer that keeps nothing.
_NAMES = (
    *("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
    "DummyLayer",
)
KINDS: tuple[type, ...] = (
    DynamicSlidingWindowLayer,
    *(getattr(cache_utils, name) for name in _NAMES if hasattr(cache_utils, name)),
)
#: Whose attention reads the tokens that an indexer chooses: DeepSeek's, of latents, and MiniMax-M3's.
INDEXED_LAYER: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
_BLOCK_INDEXED = "minimax_m3_sparse"
_STATES = ("conv_states", "recurrent_states")
#: Names of layers with K/V in the configs of releases whose caches have no others.
_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
#: Fields of configs of models that keep recurrent state, where no list of layers says which of them do.
_STATE_FIELDS = ("mamba_d_state", "ssm_state_size", "state_size")


def layers_of(config: Any) -> list[Any]:
    """Return the layers that `DynamicCache` makes for a model's decoder, refused where one is neither paged nor own.

    Raises
    ------
    ValueError
        For encoder-decoders, and for layers of other kinds than full attention and :data:`KINDS`.
    """
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; PiKVCache holds the K/V of decoder-only models")
    text = config.get_text_config(decoder=True)
    if not hasattr(text, "num_hidden_layers"):
        raise ValueError(f"{name} does not say how many layers its decoder has (num_hidden_layers)")
    if not _STATE_LAYER:
        _check_names(name, text)
    layers = list(DynamicCache(config=text).layers)
    known = (DynamicLayer, *KINDS)
    dims = indexer_dims(text, layers)
    of_no_kind = [index for index, layer in enumerate(layers) if type(layer) not in known and dims[index] is None]
    if unknown := [(index, type(layers[index]).__name__) for index in of_no_kind]:
        indexers = " and indexers that compare single tokens, where no layer shares K/V" if INDEXED_LAYER else ""
        raise ValueError(
            f"layer {unknown[0][0]} of {name} has a cache of type {unknown[0][1]}; PiKVCache knows "
            f"{', '.join(kind.__name__ for kind in known)}{indexers}"
        )
    return layers


def _check_names(name: str, text: Any) -> None:
    """Raise `ValueError` for kinds of layers that this release of transformers gives K/V although they have none."""
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    if unknown := sorted(kinds - _ATTENTION):
        raise ValueError(
            f"{name} has layers of type {', '.join(unknown)}, which transformers {INSTALLED} keeps in a "
            "cache of the model's own; newer releases, 5.24 say, keep them beside K/V, where PiKVCache leaves them"
        )
    if not kinds and (stateful := [key for key in _STATE_FIELDS if hasattr(text, key)]):
        raise ValueError(f"{name} keeps recurrent state ({stateful[0]}={getattr(text, stateful[0])}), not only K/V")


def indexer_dims(text: Any, layers: Sequence[Any]) -> list[int | None]:
    """Return the channels of each layer's indexer keys, None for a layer whose attention reads all tokens.

    Parameters
    ----------
    text : PreTrainedConfig
        Of the decoder.
    layers : sequence
        That `DynamicCache` makes for it. Those of indexers that this package does not know have None, too, and those
        that read what the indexer of a layer before them has chosen (GLM-5) have 0.
    """
    kinds = getattr(text, "indexer_types", None) or ["full"] * len(layers)
    if any(mode is not None and mode.startswith("reuse") for mode in getattr(text, "kv_sharing_modes", None) or ()):
        # Whose attention chooses among tokens of another layer (Mistral-Large-4 can be made so).
        return [None] * len(layers)
    return [_indexer_dim(config_of_layer(text, index), layers[index], kinds[index]) for index in range(len(layers))]


def _indexer_dim(config: Any, layer: Any, kind: str) -> int | None:
    holds_latents = getattr(config, "kv_lora_rank", None) is not None
    # GLM-5-Next pools tokens before it compares them.
    pools = getattr(config, "index_kpool", None) is not None
    if not is_indexed(layer) or pools or (type(layer) is INDEXED_LAYER and not holds_latents):
        return None
    return 0 if kind == "shared" else int(config.index_head_dim)


def is_indexed(layer: Any) -> bool:
    """Return whether a layer of transformers has room for the keys of an indexer."""
    return type(layer) is INDEXED_LAYER or getattr(layer, "_layer_type", None) == _BLOCK_INDEXED


def indexer_keys_of(layer: Any) -> torch.Tensor | None:
    """Return the keys `(B, T, Di)` of an indexer that a layer holds, None if it holds none."""
    keys: torch.Tensor | None = getattr(layer, "indexer_keys", None)
    if keys is None and (by_head := getattr(layer, "idx_keys", None)) is not None:
        keys = by_head.squeeze(1)
    return keys


def is_state_layer(layer: Any) -> bool:
    """Return whether a layer has states that every call changes."""
    return isinstance(layer, _STATE_LAYER)


def has_positions(layer: Any) -> bool:
    """Return whether a layer, paged or not, counts positions, as all do that have K/V."""
    return isinstance(layer, CacheLayerMixin)


def state_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Return the states of a layer by name: `conv_states.0`, `recurrent_states.0`, ...; none before the first call."""
    return {
        f"{name}.{index}": state
        for name in _STATES
        for index, state in getattr(layer, name, {}).items()
        if state is not None
    }


def tensors_of(layer: Any) -> dict[str, torch.Tensor]:
    """Return all tensors of a layer by name: `keys`, `values` and its states."""
    kept = {name: getattr(layer, name, None) for name in ("keys", "values")}
    return {name: tensor for name, tensor in kept.items() if tensor is not None} | state_tensors(layer)


def rows_of(layer: Any) -> int | None:
    """Return how many sequences a layer holds, None while it holds nothing."""
    tensors = [tensor for tensor in tensors_of(layer).values() if tensor.ndim > 1]
    return int(tensors[0].shape[0]) if tensors else None


def copied(layer: Any) -> Any:
    """Return a copy of a layer that goes on by itself."""
    kind: Any = type(layer)
    twin = kind.__new__(kind)
    vars(twin).update(_plain_copy(layer))
    for name in _STATES if is_state_layer(layer) else ():
        states = getattr(twin, name)
        states.update({index: None if state is None else state.clone() for index, state in states.items()})
    return twin


def select_rows_of(layer: Any, indices: torch.Tensor) -> None:
    """Replace the sequences of a layer by those at `indices`, a tensor of integers."""
    if rows_of(layer) is not None:
        layer.reorder_cache(indices)


@contextmanager
def undone_on_error(layer: Any) -> Iterator[None]:
    """Undo what the block does to a layer of transformers if it raises, but for what is written into its states."""
    before = _plain_copy(layer)
    try:
        yield
    except BaseException:
        vars(layer).clear()
        vars(layer).update(before)
        raise


def _plain_copy(layer: Any) -> dict[str, Any]:
    """Return a layer's attributes; states are in dictionaries, which it changes."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}


def is_recording(layer: Any) -> bool:
    """Return whether a layer keeps what it does not need until the next crop, whatever its length.

    Assisted decoding asks for that from 5.24 on.
    """
    return bool(getattr(layer, "record_past", False))


def check_can_crop(index: int, layer: Any, removed: int, length: int) -> None:
    """Raise `ValueError` if layer `index` has let go of what it needs to remove tokens down to `length` positions."""
    if not removed:
        return
    if is_state_layer(layer) and state_tensors(layer):
        _check_can_crop_state(index, layer, removed, length)
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        kept = layer.keys.shape[2]
        if kept - removed < min(length, layer.sliding_window - 1):
            raise ValueError(
                f"cannot crop to {length} of {length + removed} tokens: layer {index} only kept the last {kept}; "
                'sliding_layers="paged" keeps all, as assisted decoding needs'
            )


def _check_can_crop_state(index: int, layer: Any, removed: int, length: int) -> None:
    recurrent = any(layer.is_recurrent_states_initialized.values())
    if recurrent or not is_recording(layer):
        kind = "recurrent" if recurrent else "convolution"
        raise ValueError(
            f"cannot crop to {length} of {length + removed} tokens: layer {index} has a {kind} state, which the others "
            "have changed for good; fork() the cache before they come"
        )
    for number, state in layer.conv_states.items():
        needed = min(layer.conv_kernel_size[number], length)
        if state.shape[-1] - removed < needed:
            raise ValueError(
                f"cannot crop to {length} of {length + removed} tokens: layer {index} has recorded the last "
                f"{state.shape[-1]}, and its convolution needs the last {needed} of those that stay"
            )


def crop_layer(layer: Any, removed: int) -> None:
    """Remove the last tokens of a layer, and what it has recorded only for that."""
    if rows_of(layer) is not None and (removed or is_recording(layer)):
        layer.crop(-removed)
