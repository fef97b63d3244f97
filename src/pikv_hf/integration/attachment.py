"""Attaching PiKV to a model: its attention function, its masks and the expert recorder."""

import functools
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..common.foreign_attributes import ATTACHMENT_ATTRIBUTE
from ..common.transformers_release import warn_if_newer
from ..common.user_line import user_stacklevel
from ..distributed.device_layout import attention_device
from ..layer.cache_lock import new_cache_lock
from ..layer.model_link import LinkedLayer
from .attention_calls import AttentionCalls
from .attention_code import changes_cached_keys
from .attention_function import pikv_attention_forward
from .attention_hooks import place_attention_hooks
from .attention_implementation import ATTENTION_NAME, BATCHED_NAME, AttachedImplementation, check_may_replace
from .expert_router import ExpertRouter, Lazy
from .kvpress_marks import MARKS, forget_is_read, note_reader, take_marks
from .latent_attention import absorbs, expands_latents
from .latent_calls import LatentCalls
from .layer_calls import LayerCalls
from .mask_function import pikv_mask
from .model_hook import place_hook
from .model_modules import check_modules, feed_forward_classes, unwrapped
from .model_parts import ModelParts

#: Held while a model is attached or detached: threads may do so at the same time.
_attaching = new_cache_lock()


class Attachment:
    """What connects a model to its caches. Made by :func:`attach`; also a context manager that detaches.

    Of the model it keeps nothing alive. Copied or pickled it is None: a copied model is not attached.

    Attributes
    ----------
    caches_made : int
        Caches that were made for the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._parts = ModelParts.of(model)
        self._calls = LayerCalls()
        #: The forwards of attention that run.
        self.attention_calls = AttentionCalls()
        #: What they expand before they cache it.
        self.latents = LatentCalls(self.attention_calls)
        self._handles: list[Any] = []
        self._previous: dict[int, Any] = {}
        # A cache that is made while a press has the model attached needs it to stay so.
        self.caches_made = 0
        self._entered = 0
        self._stays = True

    def count_cache(self) -> None:
        """Note that a cache is made for the model."""
        with _attaching:
            self.caches_made += 1

    @property
    def model(self) -> Any:
        """The attached model, or None if it is gone."""
        return self._model()

    @property
    def expert_routers(self) -> dict[int, ExpertRouter]:
        """The routers found, by layer index; layers without one place tokens by position."""
        return self._parts.routers

    def is_active(self, layer_idx: int) -> bool:
        """Return whether the layer's attention calls PiKV's function now."""
        config = self._parts.configs.get(layer_idx)
        return config is not None and config._attn_implementation in (ATTENTION_NAME, BATCHED_NAME)

    def replaced(self) -> set[Any]:
        """Return the names of the attention implementations that PiKV's is in the place of."""
        active = (config for index, config in self._parts.configs.items() if self.is_active(index))
        return {self._previous_of(config) for config in active}

    def changes_keys(self, layer_idx: int) -> bool:
        """Return whether the layer's attention changes the keys that the cache has returned before it attends."""
        module = self.attention_of(layer_idx)
        return module is not None and _changes_keys(module)

    def absorbs(self, layer_idx: int) -> bool:
        """Return whether PiKV's attention reads latents in place, for which the layer's keys carry no reference."""
        module = self.attention_of(layer_idx)
        return module is not None and absorbs(module)

    def caches_latents(self, layer_idx: int) -> bool:
        """Return whether the layer of a cache may hold latents: one KV head of them, with rotary keys as its values."""
        module = self.attention_of(layer_idx)
        expands = module is not None and expands_latents(type(module))
        return expands or layer_idx in self.latents.expansions

    def slides(self, layer_idx: int) -> bool:
        """Return whether the layer's attention itself looks back over a window, as far as its module says."""
        return getattr(self.attention_of(layer_idx), "sliding_window", 1) is not None

    def refer(self, layer: Any) -> None:
        """Note that the keys of the running call of a layer's attention stand for this layer of a cache."""
        self.attention_calls.refer(layer)

    def referred_layer(self, layer_idx: int) -> Any:
        """Return the layer of a cache that :meth:`refer` noted in the running call of a layer's attention, or None."""
        return self.attention_calls.referred_layer(layer_idx)

    def implementation(self, layer_idx: int) -> str | None:
        """Return the name of the attention that the layer's config asks for."""
        config = self._parts.configs.get(layer_idx)
        return None if config is None else str(config._attn_implementation)

    def is_training(self, layer_idx: int) -> bool:
        """Return whether the layer's attention is in training mode."""
        module = self.attention_of(layer_idx)
        return module is not None and module.training

    def check_reads_caches(self, layer_idx: int) -> None:
        """Raise `ValueError` if the model passes over its cache now, as it does with gradient checkpointing."""
        if self.is_training(layer_idx) and getattr(self.model, "is_gradient_checkpointing", False):
            raise ValueError(
                "the model is in training mode with gradient checkpointing, in which its layers pass over the cache; "
                "train without one (use_cache=False), or call model.eval() or model.gradient_checkpointing_disable()"
            )

    def gives_to(self, layer: Any) -> bool:
        """Return whether the model's running attention has yet to hand its new tokens to this layer of a cache."""
        return self.attention_calls.gives_to(layer)

    def takes_update(self, layer: Any) -> bool:
        """Return, once in a call, whether new tokens of a layer of a cache come from the model's running attention."""
        return self.attention_calls.take(layer)

    def expect(self, layer: LinkedLayer) -> None:
        """Deliver the experts that the layer's router chooses in the running call to this layer of a cache."""
        self._calls.expect(layer)

    def forget(self, layer: LinkedLayer) -> None:
        """Deliver nothing to a layer whose newest tokens have changed since they were expected."""
        self._calls.forget(layer)

    def linger(self, layer: LinkedLayer) -> None:
        """Let a layer store its new tokens when the next one comes, and the one before it now."""
        self._calls.linger(layer)

    def reads(self, layer: LinkedLayer, prompt: bool) -> None:
        """Note that a layer is about to be read; see :func:`~pikv_hf.integration.kvpress_marks.note_reader`."""
        if (module := self.attention_of(layer.layer_idx)) is not None:
            note_reader(module, layer, prompt)

    def take_marks(self, layer: LinkedLayer) -> Any:
        """Return, once, what kvpress marked for this layer."""
        reference = self._parts.attention.get(layer.layer_idx)
        module = None if reference is None else reference()
        return None if module is None or vars(module).get(MARKS) is None else take_marks(module, layer)

    @property
    def active(self) -> bool:
        """Whether attention implementations and hooks are in place."""
        return any(self.is_active(index) for index in self._parts.configs)

    def owns(self, module: nn.Module) -> bool:
        """Return whether an attention module belongs to the attached model."""
        reference = self._parts.attention.get(getattr(module, "layer_idx", -1))
        return reference is not None and reference() is module

    def is_first(self, layer_idx: int) -> bool:
        """Return whether no other attention of the model comes before that of this layer."""
        return layer_idx == self._parts.first

    def attention_modules(self) -> dict[int, nn.Module]:
        """Return the decoder's attention modules by layer index."""
        return self._parts.attention_modules()

    def attention_of(self, layer_idx: int) -> nn.Module | None:
        """Return the attention module of a layer, None if there is none or the model is gone."""
        reference = self._parts.attention.get(layer_idx)
        return None if reference is None else reference()

    def query_groups(self, layer_idx: int) -> int:
        """Return the query heads per KV head of a layer, 1 if its attention does not say."""
        return int(getattr(self.attention_of(layer_idx), "num_key_value_groups", 1))

    def attention_device(self, layer_idx: int) -> torch.device:
        """Return where the attention of a layer computes."""
        return attention_device(self.attention_of(layer_idx), self.model)

    def current_parts(self) -> ModelParts:
        """Return the parts of the model, found anew if any of its modules has been replaced since."""
        return ModelParts.of(self.model) if self._parts.may_be_stale(self.model) else self._parts

    def activate(self, parts: ModelParts) -> None:
        """Set the attention implementation and place the hooks of these parts, unless they are in place."""
        for reader, config in parts.every_config():
            check_may_replace(reader, self._previous_of(config))
        _register()
        if parts != self._parts or self.latents.is_outdated():
            # Caches go on with other modules of the model as transformers' do.
            self.undo()
        self._parts = parts
        for _, config in parts.every_config():
            if config._attn_implementation != ATTENTION_NAME:
                self._previous[id(config)] = self._previous_of(config)
                config._attn_implementation = AttachedImplementation(self._previous[id(config)])
        if not self._handles:
            self._handles = [handle for index in parts.routers for handle in self._follow_router(index)]
            self._handles += place_attention_hooks(self, parts)
            self._handles += self.latents.follow(parts.attention_modules())
        for module in parts.attention_modules().values():
            if expands_latents(type(module)):
                setattr(module, ATTACHMENT_ATTRIBUTE, self)

    def _follow_router(self, index: int) -> Iterator[RemovableHandle]:
        """Hook a layer that has a router, and the router."""
        calls, router = self._calls, self.expert_routers[index]

        def deliver(experts: Lazy, confidence: Lazy) -> None:
            calls.deliver(index, experts)

        # First of all: what ends a call is called even where another hook fails before it begins.
        yield place_hook(router.layer.register_forward_pre_hook, calls.begin, index, prepend=True)
        # What has begun last ends first, where several layers begin with the same module.
        ends = router.layer.register_forward_hook
        yield place_hook(ends, calls.end, index, always_call=True, prepend=True)
        yield router.watch(deliver)

    def undo(self) -> None:
        """Restore the attention implementations and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self.attention_modules().values():
            forget_is_read(module)
        for _, config in self._parts.every_config():
            config._attn_implementation = self._previous_of(config)

    def _previous_of(self, config: Any) -> Any:
        """Return what the attention implementation is without PiKV."""
        name = config._attn_implementation
        if isinstance(name, AttachedImplementation):
            return name.previous
        # Continuous batching writes a name of its own over PiKV's.
        return self._previous.get(id(config), "sdpa") if name in (ATTENTION_NAME, BATCHED_NAME) else name

    def require_expert_routers(self, model: Any, placement: str = "expert") -> None:
        """Raise `ValueError` if no layer's routing can be read."""
        _require_expert_routers(self._parts, model, placement)

    def stay(self) -> None:
        """Outlive the `with` block that attached the model."""
        self._stays = True

    def __enter__(self) -> "Attachment":
        with _attaching:
            self._entered += 1
            if self.model is not None and not self.active:
                # Another thread has left its block since this one attached the model.
                self.activate(self.current_parts())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _attaching:
            self._entered -= 1
            if not self._entered and not self._stays and (model := self.model) is not None:
                detach(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def attach(model: Any, placement: str = "expert") -> Attachment:
    """Let a model read :class:`~pikv_hf.PiKVCache` in place and record the experts it chooses.

    The model's attention implementation becomes `"pikv"`; with any other cache, or none, it behaves as with `"sdpa"`.
    Attaching twice changes nothing, unless modules of the model have been replaced meanwhile: then the new ones are
    hooked. Undo it with :func:`detach` or by using the result as a context manager. A copy of an attached model, or one
    that was pickled, is not attached.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention uses transformers' attention interface, or what wraps one: `DistributedDataParallel`,
        `DataParallel`, `torch.compile`, PEFT.
    placement : {"expert", "balanced", "hash"}
        All but `"hash"` need routers that can be read.

    Raises
    ------
    ValueError
        For encoder-decoder models, linear-attention layers, models outside of the attention interface or with an
        attention function that is not transformers' own and, unless `placement` is `"hash"`, models without a known
        router.

    Examples
    --------
    >>> with attach(model):
    ...     model.generate(**inputs, past_key_values=PiKVCache.for_model(model))
    """
    with _attaching:
        known = attachment_of(model)
        was_active = known is not None and known.active
        attachment = ensure_attached(model, placement)
        if not was_active:
            attachment._stays = False
    return attachment


def ensure_attached(model: Any, placement: str) -> Attachment:
    """Attach a model; a new attachment outlives any `with` block. See :func:`attach`."""
    model = unwrapped(model)
    with _attaching:
        attachment = attachment_of(model)
        if attachment is None:
            warn_if_newer()
            check_modules(model)
            attachment = Attachment(model)
            _warn_if_read_densely(attachment.attention_modules())
        parts = attachment.current_parts()
        if parts is not attachment._parts:
            check_modules(model)
        if placement != "hash":
            _require_expert_routers(parts, model, placement)
        was_active = attachment.active
        attachment.activate(parts)
        attachment._stays |= not was_active
        setattr(model, ATTACHMENT_ATTRIBUTE, attachment)
    return attachment


def _changes_keys(module: nn.Module) -> bool:
    """Return whether the keys that a cache returns do not reach an attention function as they are, nor absorbed."""
    kind = type(module)
    return changes_cached_keys(kind) or (expands_latents(kind) and not absorbs(module))


def _warn_if_read_densely(modules: dict[int, nn.Module]) -> None:
    """Warn of attention modules, by layer, that lose the reference which a layer's keys carry."""
    if layers := [index for index, module in modules.items() if _changes_keys(module)]:
        warnings.warn(
            f"{type(modules[layers[0]]).__name__} changes keys between the cache and attention: {len(layers)} of "
            f"{len(modules)} layers give it all their K/V, dense, in every step. Results are right; time is that of "
            "DynamicCache or more",
            stacklevel=user_stacklevel(),
        )


def attachment_of(model: Any) -> Attachment | None:
    """Return what :func:`attach` made for this model, or the one in this wrapper, active or not."""
    model = unwrapped(model)
    attachment = getattr(model, ATTACHMENT_ATTRIBUTE, None)
    return attachment if isinstance(attachment, Attachment) and attachment.model is model else None


def detach(model: Any) -> None:
    """Undo :func:`attach`. Expert-placed caches of the model go on after it is attached again."""
    with _attaching:
        attachment = attachment_of(model)
        if attachment is not None:
            attachment.undo()


def _require_expert_routers(parts: ModelParts, model: Any, placement: str) -> None:
    """Raise `ValueError` if a model has no layer whose routing can be read."""
    if not parts.routers:
        raise ValueError(
            f"no router found in {type(model).__name__}, whose layers hold "
            f"{', '.join(feed_forward_classes(model))}; "
            f'placement="{placement}" follows a Mixture-of-Experts router, use placement="hash" for other models'
        )


def _register() -> None:
    _leave_to_python()
    # Each time: kvpress wraps every registered function at its import, and the wrapper would lose the layer reference.
    for name in (ATTENTION_NAME, BATCHED_NAME):
        AttentionInterface.register(name, pikv_attention_forward)
        AttentionMaskInterface.register(name, pikv_mask)


@functools.cache
def _leave_to_python() -> None:
    """Have `torch.compile` break its graphs where this package begins: tracing page tables takes minutes."""
    # transformers has imported it; this package alone would not.
    from torch._dynamo import trace_rules

    trace_rules.add(__name__.partition(".")[0])
