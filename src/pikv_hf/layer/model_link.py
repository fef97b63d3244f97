"""What a layer asks of the model that it is attached to, and what the model's hooks ask of a layer."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn


class ExpertCount(Protocol):
    """The router of a decoder layer, of which a layer needs to know how many experts it chooses among."""

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""


class LinkedLayer(Protocol):
    """A layer of a cache, as the hooks of a model see it."""

    layer_idx: int
    is_read: bool

    @property
    def awaited(self) -> tuple[int, int]:
        """How many rows the layer has, and how many tokens of each are its newest."""

    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers."""

    def settle_unless_awaited(self) -> None:
        """Store what is pending, unless a router or a press has yet to say where."""

    def settle_marks(self) -> None:
        """Evict the tokens that kvpress's head-wise presses have marked on the attention module."""


class Expansion(Protocol):
    """How latents and rotary keys become keys and values of all heads."""

    @property
    def stored(self) -> tuple[int, int, int]:
        """Return `(1, R, Dr)`, heads, latent and rotary channels as they are stored."""

    @property
    def expanded(self) -> tuple[int, int, int]:
        """Return `(H, D, Dv)`, heads and channels of keys and values."""

    def held(self) -> "Expansion":
        """Return this for latents that are stored: it goes on whatever becomes of the model."""

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if it would expand stored latents to something else than they were."""

    def expand(self, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(B, H, T, D)` and `(B, H, T, Dv)` of `(B, 1, T, R)` and `(B, 1, T, Dr)`."""


class Latents(Protocol):
    """What attention that expands latents before it caches them has of them."""

    @property
    def expansions(self) -> Mapping[int, Expansion]:
        """How the latents of a layer are expanded, by layer, of those whose attention has some."""

    def of_call(self, layer_idx: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return, once, `(B, 1, Q, R)` and `(B, 1, Q, Dr)` of the running call's keys `(B, H, Q, D)`, or None."""


class ModelLink(Protocol):
    """The model that a cache is made for; :class:`~pikv_hf.integration.attachment.Attachment` is one."""

    @property
    def expert_routers(self) -> Mapping[int, ExpertCount]:
        """The expert routers of the model, by layer index."""

    @property
    def latents(self) -> Latents:
        """What attention that expands latents before it caches them has of them."""

    def is_active(self, layer_idx: int) -> bool:
        """Return whether the layer's attention calls PiKV's function now."""

    def implementation(self, layer_idx: int) -> str | None:
        """Return the name of the attention that the layer's config asks for."""

    def is_training(self, layer_idx: int) -> bool:
        """Return whether the layer's attention is in training mode."""

    def check_reads_caches(self, layer_idx: int) -> None:
        """Raise `ValueError` if the model passes over its cache now, as it does with gradient checkpointing."""

    def changes_keys(self, layer_idx: int) -> bool:
        """Return whether the layer's attention changes the keys that the cache has returned before it attends."""

    def absorbs(self, layer_idx: int) -> bool:
        """Return whether PiKV's attention reads latents in place, for which the layer's keys carry no reference."""

    def caches_latents(self, layer_idx: int) -> bool:
        """Return whether the layer of a cache may hold latents: one KV head of them, with rotary keys as its values."""

    def slides(self, layer_idx: int) -> bool:
        """Return whether the layer's attention itself looks back over a window, as far as its module says."""

    def refer(self, layer: Any) -> None:
        """Note that the keys of the running call of a layer's attention stand for this layer of a cache."""

    def owns(self, module: nn.Module) -> bool:
        """Return whether an attention module belongs to the model."""

    def query_groups(self, layer_idx: int) -> int:
        """Return the query heads per KV head of a layer."""

    def attention_of(self, layer_idx: int) -> nn.Module | None:
        """Return the attention module of a layer, None if there is none or the model is gone."""

    def attention_device(self, layer_idx: int) -> torch.device:
        """Return where the attention of a layer computes."""

    def takes_update(self, layer: Any) -> bool:
        """Return, once in a call, whether new tokens of a layer of a cache come from the model's running attention."""

    def expect(self, layer: LinkedLayer) -> None:
        """Deliver the experts that the layer's router chooses in the running call to this layer of a cache."""

    def forget(self, layer: LinkedLayer) -> None:
        """Deliver no experts to a layer whose newest tokens have changed since they were expected."""

    def linger(self, layer: LinkedLayer) -> None:
        """Have a layer store its new tokens when the next layer comes, and the one before it now."""

    def reads(self, layer: LinkedLayer, prompt: bool) -> None:
        """Note that the layer's attention is about to read this layer of a cache."""

    def take_marks(self, layer: LinkedLayer) -> Any:
        """Return, once, `(rows, heads, columns)` of the tokens that kvpress marked for this layer, or None."""
