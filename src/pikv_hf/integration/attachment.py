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
from ..layer.layer import PiKVLayer
from ..layer.model_link import LinkedLayer
from .attention_function import pikv_attention_forward
from .expert_router import ExpertRouter, find_router
from .kvpress_marks import note_reader, take_marks
from .mask_function import pikv_mask
from .prefetch import read_ahead

ATTENTION_NAME = "pikv"


class Attachment:
    """What connects a model to its caches. Made by :func:`attach`; also a context manager that detaches.

    Attributes
    ----------
    routers : dict of int to ExpertRouter
        The routers found, by layer index; layers without one place tokens by position.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._configs = _attention_configs(model)
        self.expert_routers = _find_routers(model)
        modules = _attention_modules(model)
        self._modules = {id(module) for _, module in modules.values()}
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

    def require_routers(self, model: Any, placement: str = "expert") -> None:
        """Raise `ValueError` if no layer's routing can be read."""
        if not self.expert_routers:
            raise ValueError(
                f"no router found in {type(model).__name__}, whose layers hold "
                f"{', '.join(_feed_forward_classes(model))}; "
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
        read_ahead(alive.attention_of, module, args, kwargs)
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
        attachment.require_routers(model, placement)
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


def check_supported(config: Any) -> None:
    """Raise `ValueError` for architectures whose state is not a K/V cache of decoder self-attention."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; PiKVCache holds the K/V of decoder-only models")
    text = config.get_text_config(decoder=True)
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    if unknown := sorted(kinds - known - {"attention"}):
        raise ValueError(f"{name} has layers of type {', '.join(unknown)}; PiKVCache knows {', '.join(sorted(known))}")
    stateful = [key for key in ("mamba_d_state", "ssm_state_size", "state_size") if hasattr(text, key)]
    if stateful:
        raise ValueError(f"{name} keeps recurrent state ({stateful[0]}={getattr(text, stateful[0])}), not only K/V")


def _register() -> None:
    # Each time: kvpress wraps every registered function at its import, and the wrapper would lose the layer reference.
    AttentionInterface.register(ATTENTION_NAME, pikv_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, pikv_mask)


def _attention_modules(model: Any) -> dict[int, tuple[str, nn.Module]]:
    """Return name and module of the decoder's self-attention by layer index."""
    text = model.config.get_text_config(decoder=True)
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__ and _config_of(module, text) is text:
            found[index] = name, module
    return found


def _config_of(module: nn.Module, default: Any) -> Any:
    return getattr(module, "config", default)


def _attention_configs(model: Any) -> dict[int, Any]:
    modules = _attention_modules(model)
    if not modules:
        seen = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        raise ValueError(f"{type(model).__name__} has no decoder self-attention that can be attached; seen: {seen}")
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
            "replaced; PiKVCache(config=model.config) works with it as it is"
        )
    text = model.config.get_text_config(decoder=True)
    return {index: _config_of(module, text) for index, (_, module) in modules.items()}


def _decoder_layers(model: Any) -> dict[int, tuple[list[nn.Module], nn.Module]]:
    """Return, by layer index, the modules around the layer's attention alone, innermost first, and the attention."""
    modules = _attention_modules(model)
    every = {id(attention) for _, attention in modules.values()}
    layers = {}
    for index, (name, attention) in modules.items():
        around = []
        while name := name.rpartition(".")[0]:
            ancestor = model.get_submodule(name)
            if any(id(module) in every and module is not attention for module in ancestor.modules()):
                break
            around.append(ancestor)
        layers[index] = around, attention
    return layers


def _find_routers(model: Any) -> dict[int, ExpertRouter]:
    text = model.config.get_text_config(decoder=True)
    routers = {}
    for index, (around, attention) in _decoder_layers(model).items():
        found = (find_router(layer, attention, text) for layer in around)
        if (router := next(filter(None, found), None)) is not None:
            routers[index] = router
    return routers


def _feed_forward_classes(model: Any) -> list[str]:
    """Return the class names in the decoder layers outside of attention, for messages about missing routers."""
    names: set[str] = set()
    for around, attention in _decoder_layers(model).values():
        inside = set(attention.modules())
        names |= {type(m).__name__ for layer in around for m in layer.modules() if m not in inside}
    return sorted(names)
