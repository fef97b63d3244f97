"""What comes before and after the forwards of an attached model and of its attention: checks, above all."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..common.transformers_release import cache_of_call
from ..layer.layer import PiKVLayer
from .attention_calls import DECODER, AttentionCalls, called_cache, layer_of_call
from .attention_code import running_code
from .attention_implementation import ATTENTION_NAME
from .call_arguments import check_weights_not_asked
from .call_checks import check_call
from .model_hook import place_hook
from .model_parts import ModelParts
from .prefetch import prefetch_next_layer
from .running_attention import check_was_read, note_running, paged_layer


class AttachedModel(Protocol):
    """What the hooks ask of :class:`~pikv_hf.integration.attachment.Attachment`."""

    attention_calls: AttentionCalls

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
    modules, around = parts.attention_modules(), parts.around_modules()
    if parts.begins_with_state and around:
        # Layers with states come first, which nothing can be taken back from.
        before = functools.partial(_before_layers, reference, parts.first)
        yield place_hook(around[-1].register_forward_pre_hook, before, with_kwargs=True)
        after = functools.partial(_after, attachment.attention_calls, DECODER)
        yield place_hook(around[-1].register_forward_hook, after, always_call=True, prepend=True)
    for index, module in modules.items():
        before = functools.partial(_before_attention, reference)
        yield place_hook(module.register_forward_pre_hook, before, with_kwargs=True)
        after = functools.partial(_after, attachment.attention_calls, index)
        yield place_hook(module.register_forward_hook, after, always_call=True, prepend=True)
        yield place_hook(module.register_forward_hook, _after_attention, with_kwargs=True)


def _before_model(
    attachment: "weakref.ref[AttachedModel]", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if (alive := attachment()) is not None:
        check_weights_not_asked(module, args, kwargs, alive.replaced)


def _before_layers(
    attachment: "weakref.ref[AttachedModel]",
    first: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if (alive := attachment()) is not None:
        cache = called_cache(args, kwargs)
        if (attention := alive.attention_of(first)) is not None:
            check_call(alive, attention, module, cache, args, kwargs)
        alive.attention_calls.begin(DECODER, cache)


def _before_attention(
    attachment: "weakref.ref[AttachedModel]", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if (alive := attachment()) is not None:
        index, cache = getattr(module, "layer_idx", -1), called_cache(args, kwargs)
        if alive.is_first(module):
            check_call(alive, module, module, cache, args, kwargs)
        alive.attention_calls.begin(index, layer_of_call(index, cache))
        if (layer := paged_layer(module, cache)) is not None:
            layer.reference.attends_with(running_code(module))
        note_running(cache)
        prefetch_next_layer(alive.attention_of, module, args, kwargs)
    return _fit_mask(module, args, kwargs)


def _after(calls: AttentionCalls, layer_idx: int, *_: Any) -> None:
    calls.end(layer_idx)


def _after_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
    check_was_read(module, called_cache(args, kwargs))


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
