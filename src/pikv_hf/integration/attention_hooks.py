"""What comes before the forwards of an attached model and of its attention: checks, while nothing has changed."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from ..common.transformers_release import cache_of_call
from ..layer.layer import PiKVLayer
from .attention_implementation import ATTENTION_NAME
from .call_arguments import check_owner_and_dropout, check_weights_not_asked
from .mask_function import check_mask_of_cache
from .model_hook import place_hook
from .model_parts import ModelParts
from .prefetch import prefetch_next_layer


class AttachedModel(Protocol):
    """What the hooks ask of :class:`~pikv_hf.integration.attachment.Attachment`."""

    def replaced(self) -> set[Any]:
        """Return the names of the attention implementations that PiKV's is in the place of."""

    def is_first(self, module: nn.Module) -> bool:
        """Return whether no other attention of the model comes before this one."""

    def attention_of(self, layer_idx: int) -> nn.Module | None:
        """Return the attention module of a layer."""


def place_attention_hooks(attachment: AttachedModel, parts: ModelParts) -> Iterator[RemovableHandle]:
    """Hook the attention of a model, and what is around all of it; yield the handles."""
    reference = weakref.ref(attachment)
    for module in parts.around_modules():
        before = functools.partial(_before_model, reference)
        yield place_hook(module.register_forward_pre_hook, before, with_kwargs=True)
    for module in parts.attention_modules().values():
        before = functools.partial(_before_attention, reference)
        yield place_hook(module.register_forward_pre_hook, before, with_kwargs=True)


def _before_model(
    attachment: "weakref.ref[AttachedModel]", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if (alive := attachment()) is not None:
        check_weights_not_asked(module, args, kwargs, alive.replaced)


def _before_attention(
    attachment: "weakref.ref[AttachedModel]", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if (alive := attachment()) is not None:
        if alive.is_first(module):
            # What later layers would refuse when sliding ones before them have changed.
            check_owner_and_dropout(alive, module, cache_of_call(kwargs))
            check_mask_of_cache(cache_of_call(kwargs), kwargs.get("attention_mask"))
        if (layer := _layer_of_call(module, args, kwargs)) is not None:
            layer.called = True
        prefetch_next_layer(alive.attention_of, module, args, kwargs)
    return _fit_mask(module, args, kwargs)


def _fit_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut the mask, one for all layers, to a layer of fewer columns, where another implementation attends."""
    if getattr(getattr(module, "config", None), "_attn_implementation", ATTENTION_NAME) == ATTENTION_NAME:
        return None
    index, mask = getattr(module, "layer_idx", -1), kwargs.get("attention_mask")
    layers = getattr(cache_of_call(kwargs), "layers", ())
    if not isinstance(mask, torch.Tensor) or not 0 <= index < len(layers):
        return None
    layer = layers[index]
    dropped = layer.state.dropped if isinstance(layer, PiKVLayer) else 0
    # What was assigned is all visible, and so is what was seen before: the mask's last columns are the layer's own.
    return (args, {**kwargs, "attention_mask": mask[..., dropped:]}) if dropped else None


def _layer_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PiKVLayer | None:
    """Return the layer of a cache that an attention module is called with; None for layers that are not PiKV's."""
    cache = cache_of_call(kwargs)
    if cache is None:
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
    layers, index = getattr(cache, "layers", ()), getattr(module, "layer_idx", -1)
    layer = layers[index] if 0 <= index < len(layers) else None
    return layer if isinstance(layer, PiKVLayer) else None
