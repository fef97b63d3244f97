"""Attaching PiKV to a model: its attention function, its masks and the expert recorder."""

import functools
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..common.foreign_attributes import ATTACHMENT_ATTRIBUTE
from ..distributed.device_layout import attention_device
from ..layer.layer import PiKVLayer
from ..layer.model_link import LinkedLayer
from .attention_function import pikv_attention_forward
from .kvpress_marks import note_reader, take_marks
from .mask_function import check_mask_of_cache, pikv_mask
from .model_modules import (
    check_supported,
    feed_forward_classes,
    find_attention_configs,
    find_attention_modules,
    find_expert_routers,
)
from .prefetch import prefetch_next_layer

ATTENTION_NAME = "pikv"


class Attachment:
    """What connects a model to its caches. Made by :func:`attach`; also a context manager that detaches.

    Attributes
    ----------
    expert_routers : dict of int to ExpertRouter
        The routers found, by layer index; layers without one place tokens by position.
    caches_made : int
        Caches that were made for the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._configs = find_attention_configs(model)
        self.expert_routers = find_expert_routers(model)
        modules = find_attention_modules(model)
        self._modules = {id(module) for _, module in modules.values()}
        self._first = min(modules)
        self._attention = {index: weakref.ref(module) for index, (_, module) in modules.items()}
        self._waiting: dict[int, weakref.ref[LinkedLayer]] = {}
        self._lingering: weakref.ref[LinkedLayer] | None = None
        self._handles: list[Any] = []
        self._previous: dict[int, Any] = {}
        # A cache that is made while a press has the model attached needs it to stay so.
        self.caches_made = 0
        self._entered = 0
        self._stays = True

    @property
    def model(self) -> Any:
        """The attached model, or None if it is gone."""
        return self._model()

    def is_active(self, layer_idx: int) -> bool:
        """Return whether the layer's attention calls PiKV's function now."""
        config = self._configs.get(layer_idx)
        return config is not None and config._attn_implementation == ATTENTION_NAME

    def expect(self, layer: LinkedLayer) -> None:
        """Deliver the next experts that the layer's router chooses to this layer of a cache."""
        self._waiting[layer.layer_idx] = weakref.ref(layer)

    def forget(self, layer: LinkedLayer) -> None:
        """Deliver nothing to a layer whose newest tokens have changed since they were expected."""
        reference = self._waiting.get(layer.layer_idx)
        if reference is not None and reference() is layer:
            del self._waiting[layer.layer_idx]

    def linger(self, layer: LinkedLayer) -> None:
        """Let a layer store its new tokens when the next one comes, and the one before it now."""
        before = None if self._lingering is None else self._lingering()
        self._lingering = weakref.ref(layer)
        if before is not None and before is not layer:
            before.settle_unless_awaited()

    def reads(self, layer: LinkedLayer, prompt: bool) -> None:
        """Note that a layer is about to be read; see :func:`~pikv_hf.integration.kvpress_marks.note_reader`."""
        if (module := self.attention_of(layer.layer_idx)) is not None:
            note_reader(module, layer, prompt)

    def take_marks(self, layer: LinkedLayer) -> Any:
        """Return, once, what kvpress marked for this layer."""
        return take_marks(self.attention_of(layer.layer_idx), layer)

    def _receiver(self, layer_idx: int) -> Any:
        def deliver(experts: torch.Tensor) -> None:
            reference = self._waiting.pop(layer_idx, None)
            layer = None if reference is None else reference()
            if layer is not None:
                layer.record_experts(experts)

        return deliver

    @property
    def active(self) -> bool:
        """Whether attention implementations and hooks are in place."""
        return any(self.is_active(index) for index in self._configs)

    def owns(self, module: nn.Module) -> bool:
        """Return whether an attention module belongs to the attached model."""
        return id(module) in self._modules

    def is_first(self, module: nn.Module) -> bool:
        """Return whether no other attention of the model comes before this one."""
        return getattr(module, "layer_idx", None) == self._first

    def attention_modules(self) -> dict[int, nn.Module]:
        """Return the decoder's attention modules by layer index."""
        modules = {index: reference() for index, reference in self._attention.items()}
        return {index: module for index, module in modules.items() if module is not None}

    def attention_of(self, layer_idx: int) -> nn.Module | None:
        """Return the attention module of a layer, None if there is none or the model is gone."""
        reference = self._attention.get(layer_idx)
        return None if reference is None else reference()

    def query_groups(self, layer_idx: int) -> int:
        """Return the query heads per KV head of a layer, 1 if its attention does not say."""
        return int(getattr(self.attention_of(layer_idx), "num_key_value_groups", 1))

    def attention_device(self, layer_idx: int) -> torch.device:
        """Return where the attention of a layer computes."""
        return attention_device(self.attention_of(layer_idx), self.model)

    def activate(self) -> None:
        """Set the attention implementation and place the hooks, unless they are in place."""
        _register()
        for config in self._configs.values():
            if config._attn_implementation != ATTENTION_NAME:
                self._previous[id(config)] = config._attn_implementation
                config._attn_implementation = ATTENTION_NAME
        if not self._handles:
            self._handles = [router.listen(self._receiver(index)) for index, router in self.expert_routers.items()]
            before = functools.partial(_before_attention, weakref.ref(self))
            for module in filter(None, [reference() for reference in self._attention.values()]):
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def undo(self) -> None:
        """Restore the attention implementations and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for config in self._configs.values():
            if config._attn_implementation == ATTENTION_NAME:
                # A copy of an attached model starts out with this name and never had another.
                config._attn_implementation = self._previous.get(id(config), "sdpa")

    def require_expert_routers(self, model: Any, placement: str = "expert") -> None:
        """Raise `ValueError` if no layer's routing can be read."""
        if not self.expert_routers:
            raise ValueError(
                f"no router found in {type(model).__name__}, whose layers hold "
                f"{', '.join(feed_forward_classes(model))}; "
                f'placement="{placement}" follows a Mixture-of-Experts router, use placement="hash" for other models'
            )

    def stay(self) -> None:
        """Outlive the `with` block that attached the model."""
        self._stays = True

    def __enter__(self) -> "Attachment":
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered and not self._stays and (model := self.model) is not None:
            detach(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # A copied model is not attached: the hooks of this one report to this one's caches.
        return None


def _fit_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut the mask, one for all layers, to a layer of fewer columns, where another implementation attends."""
    if getattr(getattr(module, "config", None), "_attn_implementation", ATTENTION_NAME) == ATTENTION_NAME:
        return None
    index, mask = getattr(module, "layer_idx", -1), kwargs.get("attention_mask")
    layers = getattr(kwargs.get("past_key_values"), "layers", ())
    if not isinstance(mask, torch.Tensor) or not 0 <= index < len(layers):
        return None
    layer = layers[index]
    dropped = layer.state.dropped if isinstance(layer, PiKVLayer) else 0
    # What was assigned is all visible, and so is what was seen before: the mask's last columns are the layer's own.
    return (args, {**kwargs, "attention_mask": mask[..., dropped:]}) if dropped else None


def _before_attention(
    attachment: "weakref.ref[Attachment]", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if (alive := attachment()) is not None:
        if alive.is_first(module):
            check_mask_of_cache(kwargs.get("past_key_values"), kwargs.get("attention_mask"))
        prefetch_next_layer(alive.attention_of, module, args, kwargs)
    return _fit_mask(module, args, kwargs)


def attach(model: Any, placement: str = "expert") -> Attachment:
    """Let a model read :class:`~pikv_hf.PiKVCache` in place and record the experts it chooses.

    The model's attention implementation becomes `"pikv"`; with any other cache, or none, it behaves as with `"sdpa"`.
    Attaching twice changes nothing. Undo it with :func:`detach` or by using the result as a context manager.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention uses transformers' attention interface.
    placement : {"expert", "balanced", "hash"}
        All but `"hash"` need routers that can be read.

    Raises
    ------
    ValueError
        For encoder-decoder models, linear-attention layers, models outside of the attention interface and, unless
        `placement` is `"hash"`, models without a known router.

    Examples
    --------
    >>> with attach(model):
    ...     model.generate(**inputs, past_key_values=PiKVCache.for_model(model))
    """
    known = attachment_of(model)
    was_active = known is not None and known.active
    attachment = ensure_attached(model, placement)
    if not was_active:
        attachment._stays = False
    return attachment


def ensure_attached(model: Any, placement: str) -> Attachment:
    """Attach a model; a new attachment outlives any `with` block. See :func:`attach`."""
    attachment = attachment_of(model)
    if attachment is None:
        check_supported(model.config)
        if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
            raise ValueError(
                f"{type(model).__name__} keeps its state in a cache of its own, not in one of transformers'"
            )
        attachment = Attachment(model)
    if not attachment.active:
        attachment._stays = True
    if placement != "hash":
        attachment.require_expert_routers(model, placement)
    attachment.activate()
    setattr(model, ATTACHMENT_ATTRIBUTE, attachment)
    return attachment


def attachment_of(model: Any) -> Attachment | None:
    """Return what :func:`attach` made for this model, active or not."""
    attachment = getattr(model, ATTACHMENT_ATTRIBUTE, None)
    return attachment if isinstance(attachment, Attachment) and attachment.model is model else None


def detach(model: Any) -> None:
    """Undo :func:`attach`. Expert-placed caches of the model go on after it is attached again."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.undo()


def _register() -> None:
    # Each time: kvpress wraps every registered function at its import, and the wrapper would lose the layer reference.
    AttentionInterface.register(ATTENTION_NAME, pikv_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, pikv_mask)
