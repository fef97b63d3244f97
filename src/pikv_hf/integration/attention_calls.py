"""The attention modules whose forward runs now: only what they hand to a cache will be read from its pages."""

import threading
import weakref
from typing import Any

import torch
from transformers import Cache

from ..common.transformers_release import cache_of_call

#: In place of an attention's layer: the decoder, where layers with states come first, which are given whole caches.
DECODER = -1


class AttentionCalls(threading.local):
    """The forwards of a model's attention modules that run in this thread, nested ones last; each thread sees its own.

    What is known of a call ends with it, whether it got so far as to give its cache new tokens or not.
    """

    def __init__(self) -> None:
        # Of each the layer of the model, and that of its cache until this has got the call's tokens.
        self._stack: list[tuple[int, weakref.ref[Any] | None]] = []
        # Of each the layer that its keys stand for, though they do not carry a reference to it.
        self._meant: list[weakref.ref[Any] | None] = []
        # Of each the latents that it has expanded.
        self._latents: list[torch.Tensor | None] = []

    def begin(self, layer_idx: int, layer: Any) -> None:
        """Note that an attention module begins, which will hand new tokens to this layer of a cache, or to None."""
        # Ctrl-C ends a call without a word: no layer is in two.
        if self._stack and layer is not None:
            self.take(layer)
        self._stack.append((layer_idx, None if layer is None else weakref.ref(layer)))
        self._meant.append(None)
        self._latents.append(None)

    def end(self, layer_idx: int) -> None:
        """Note that an attention module has ended, or failed, perhaps before it began for :meth:`begin`."""
        if self._stack and self._stack[-1][0] == layer_idx:
            self._stack.pop()
            self._meant.pop()
            self._latents.pop()

    def refer(self, layer: Any) -> None:
        """Note that the keys of the innermost call, if it is of this layer's attention, stand for this layer."""
        if self._stack and self._stack[-1][0] == layer.layer_idx:
            self._meant[-1] = weakref.ref(layer)

    def referred_layer(self, layer_idx: int) -> Any:
        """Return the layer that the keys of the innermost call stand for, None if that is not of this attention."""
        if not self._stack or self._stack[-1][0] != layer_idx or (meant := self._meant[-1]) is None:
            return None
        return meant()

    def note_latents(self, layer_idx: int, latents: Any) -> None:
        """Note what the innermost call, if it is of this attention and has yet to give a cache its tokens, expands."""
        if self._stack and self._stack[-1][0] == layer_idx and self._stack[-1][1] is not None:
            self._latents[-1] = latents

    def take_latents(self, layer_idx: int) -> torch.Tensor | None:
        """Return, once, what the innermost call has expanded, None if that is not of this attention."""
        if not self._stack or self._stack[-1][0] != layer_idx:
            return None
        latents, self._latents[-1] = self._latents[-1], None
        return latents

    def gives_to(self, layer: Any) -> bool:
        """Return whether a running call has yet to hand its tokens to this layer of a cache."""
        return any(given is not None and given() is layer for _, given in self._stack)

    def take(self, layer: Any) -> bool:
        """Return, once in a call, whether a running one hands its tokens to this layer of a cache."""
        for place, (layer_idx, given) in enumerate(self._stack):
            if given is not None and given() is layer:
                self._stack[place] = layer_idx, None
                return True
        return False


def called_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the cache that an attention module is called with, under whatever name, None if with none."""
    if (cache := cache_of_call(kwargs)) is not None:
        return cache
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)


def layer_of_call(layer_idx: int, cache: Any) -> Any:
    """Return the layer of a cache that belongs to a layer of the model, None if there is none."""
    layers = getattr(cache, "layers", ())
    return layers[layer_idx] if 0 <= layer_idx < len(layers) else None
