"""What comes before and after the forwards of an attached model and of its attention: checks, above all."""

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..common.foreign_attributes import OBSERVER_ATTRIBUTE
from ..layer.layer import PiKVLayer
from .attention_calls import DECODER, AttentionCalls, called_cache, layer_of_call
from .attention_code import running_code
from .attention_implementation import ATTENTION_NAME
from .call_arguments import check_weights_not_asked
from .call_checks import check_call
from .model_hook import place_hook
from .model_parts import ModelParts
from .prefetch import prefetch_next_layer
from .query_turns import begin_turn
from .running_attention import check_was_read, note_running


class AttachedModel(Protocol):
    """What the hooks ask of :class:`~pikv_hf.integration.attachment.Attachment`."""

    attention_calls: AttentionCalls

    def replaced(self) -> set[Any]:
        """Return the names of the attention implementations that PiKV's is in the place of."""

    def is_first(self, layer_idx: int) -> bool:
        """Return whether no other attention of the model comes before that of this layer."""

    def attention_of(self, layer_idx: int) -> nn.Module | None:
        """Return the attention module of a layer."""


def place_attention_hooks(attachment: AttachedModel, parts: ModelParts) -> Iterator[RemovableHandle]:
    """Hook the attention of a model, and what is around all of it; yield the handles."""
    reference = weakref.ref(attachment)
    for module in parts.around_modules():
        yield place_hook(module.register_forward_pre_hook, _before_model, reference, with_kwargs=True)
    modules, around = parts.attention_modules(), parts.around_modules()
    if parts.begins_with_state and around:
        # Layers with states come first, which nothing can be taken back from.
        before = around[-1].register_forward_pre_hook
        yield place_hook(before, _before_layers, reference, parts.first, with_kwargs=True)
        after = around[-1].register_forward_hook
        yield place_hook(after, _after_layers, attachment.attention_calls, always_call=True, prepend=True)
    for index, module in modules.items():
        before, after = module.register_forward_pre_hook, module.register_forward_hook
        yield place_hook(before, _before_attention, reference, with_kwargs=True)
        given = attachment.attention_calls, index
        yield place_hook(after, _after_attention, *given, with_kwargs=True, always_call=True, prepend=True)


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
    index, cache = getattr(module, "layer_idx", -1), called_cache(args, kwargs)
    layer = layer_of_call(index, cache)
    is_paged = isinstance(layer, PiKVLayer)
    if (alive := attachment()) is not None:
        if alive.is_first(index):
            check_call(alive, module, module, cache, args, kwargs)
        alive.attention_calls.begin(index, layer)
        if is_paged:
            layer.reference.attends_with(running_code(module))
        observer = vars(module).get(OBSERVER_ATTRIBUTE)
        if getattr(observer, "recalls", False) or (is_paged and layer.edits.joint is not None):
            begin_turn(module, cache, kwargs)
        note_running(cache)
        if getattr(cache, "tiers", None) is not None:
            prefetch_next_layer(alive.attention_of, module, args, kwargs)
    return (
        _fit_mask(module, layer.store.state.dropped, args, kwargs) if is_paged and layer.store.state.dropped else None
    )


def _after_layers(calls: AttentionCalls, *_: Any) -> None:
    calls.end(DECODER)


def _after_attention(
    calls: AttentionCalls, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    calls.end(layer_idx)
    # A forward that has failed has no output.
    if output is not None:
        check_was_read(module, called_cache(args, kwargs))


def _fit_mask(module: nn.Module, dropped: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut the mask, one for all layers, to a layer of fewer columns, where another implementation attends."""
    mask = kwargs.get("attention_mask")
    if getattr(getattr(module, "config", None), "_attn_implementation", ATTENTION_NAME) == ATTENTION_NAME:
        return None
    # What was assigned is all visible, and so is what was seen before: the mask's last columns are the layer's own.
    return (args, {**kwargs, "attention_mask": mask[..., dropped:]}) if isinstance(mask, torch.Tensor) else None
