"""The decoder layers whose forward runs now: what a router chooses is of the call that it runs in.

A model's modules do not tell one call from another. Threads run them at the same time, each with a cache of its own,
and a hook may run the whole model within the forward of one of its layers, with another cache or with none.
"""

import threading
import weakref

from ..layer.model_link import LinkedLayer


class LayerCall:
    """One forward of a decoder layer.

    Attributes
    ----------
    layer_idx : int
        The model layer.
    waiting : weakref or None
        To the layer of a cache that got new tokens in this call and waits for their experts.
    """

    __slots__ = ("layer_idx", "waiting")

    def __init__(self, layer_idx: int) -> None:
        self.layer_idx = layer_idx
        # Weak: a call that Ctrl-C ended stays on the stack for good.
        self.waiting: weakref.ref[LinkedLayer] | None = None


class LayerCalls(threading.local):
    """The forwards of a model's routed layers that run in this thread, nested ones last; each thread sees its own."""

    def __init__(self) -> None:
        self._stack: list[LayerCall] = []
        self._lingering: weakref.ref[LinkedLayer] | None = None

    def begin(self, layer_idx: int) -> None:
        """Note that the forward of a layer begins."""
        self._stack.append(LayerCall(layer_idx))

    def end(self, layer_idx: int) -> None:
        """Note that the forward of a layer has ended, or failed, perhaps before it began for :meth:`begin`."""
        if self._stack and self._stack[-1].layer_idx == layer_idx:
            self._stack.pop()

    def expect(self, layer: LinkedLayer) -> None:
        """Let a layer of a cache have what the router of the running forward chooses next."""
        if (call := self._running(layer.layer_idx)) is not None:
            call.waiting = weakref.ref(layer)

    def take_waiting(self, layer_idx: int) -> LinkedLayer | None:
        """Return, once, which layer of a cache waits for the router of a layer; None in calls with other caches."""
        if (call := self._running(layer_idx)) is None:
            return None
        waiting, call.waiting = call.waiting, None
        return None if waiting is None else waiting()

    def _running(self, layer_idx: int) -> LayerCall | None:
        """Return the innermost forward of a layer; one whose router is in a later block runs as long as the model."""
        return next((call for call in reversed(self._stack) if call.layer_idx == layer_idx), None)

    def forget(self, layer: LinkedLayer) -> None:
        """Let a layer of a cache wait no longer."""
        for call in self._stack:
            if call.waiting is not None and call.waiting() is layer:
                call.waiting = None

    def linger(self, layer: LinkedLayer) -> None:
        """Let a layer store its new tokens when the next one comes, and the one before it now."""
        before = None if self._lingering is None else self._lingering()
        self._lingering = weakref.ref(layer)
        if before is not None and before is not layer:
            before.settle_unless_awaited()
