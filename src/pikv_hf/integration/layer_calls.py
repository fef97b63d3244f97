"""The decoder layers whose forward runs now: what a router chooses is of the call that it runs in.

A model's modules do not tell one call from another. Threads run them at the same time, each with a cache of its own,
and a hook may run the whole model within the forward of one of its layers, with another cache or with none.
"""

import functools
import threading
import warnings
import weakref
from typing import Any

import torch

from ..layer.model_link import LinkedLayer
from .expert_router import Lazy


class LayerCall:
    """One forward of a decoder layer.

    Attributes
    ----------
    layer_idx : int
        The model layer.
    waiting : weakref or None
        To the layer of a cache that got new tokens in this call and waits for their experts.
    pieces : list of torch.Tensor
        `(T,)` experts that the router has chosen so far, where it is given some of the tokens at a time.
    """

    __slots__ = ("layer_idx", "pieces", "waiting")

    def __init__(self, layer_idx: int) -> None:
        self.layer_idx = layer_idx
        self.pieces: list[torch.Tensor] = []
        # Weak: a call that Ctrl-C ended stays on the stack for good.
        self.waiting: weakref.ref[LinkedLayer] | None = None


class LayerCalls(threading.local):
    """The forwards of a model's routed layers that run in this thread, nested ones last; each thread sees its own."""

    def __init__(self) -> None:
        self._stack: list[LayerCall] = []
        self._lingering: weakref.ref[LinkedLayer] | None = None

    def begin(self, layer_idx: int, *_: Any) -> None:
        """Note that the forward of a layer begins: a hook before it."""
        self._stack.append(LayerCall(layer_idx))

    def end(self, layer_idx: int, _module: Any = None, _args: Any = None, output: Any = True) -> None:
        """Note that the forward of a layer has ended, or failed, perhaps before it began for :meth:`begin`.

        A hook after it: one that has failed has no output.
        """
        if self._stack and self._stack[-1].layer_idx == layer_idx:
            call = self._stack.pop()
            if (
                call.pieces
                and output is not None
                and call.waiting is not None
                and (layer := call.waiting()) is not None
            ):
                _place_by_position(layer)

    def expect(self, layer: LinkedLayer) -> None:
        """Let a layer of a cache have what the router of the running forward chooses next."""
        if (call := self._running(layer.layer_idx)) is not None:
            call.waiting, call.pieces = weakref.ref(layer), []

    def deliver(self, layer_idx: int, experts: Lazy) -> None:
        """Give what the router of a layer has chosen, `(T,)`, to the layer of a cache that waits for it, if one does.

        Where the router is given some of the tokens at a time, that is when it was given as many as there are. If it is
        not known then which they are, or it never is given all, they go where tokens go that no router has seen.
        """
        call = self._running(layer_idx)
        if call is None or call.waiting is None or (layer := call.waiting()) is None:
            return
        piece = experts()
        if piece.ndim != 1:
            piece = piece.reshape(-1)
        call.pieces.append(piece)
        rows, new = layer.awaited
        given = piece.numel() if len(call.pieces) == 1 else sum(each.numel() for each in call.pieces)
        if given < rows * new:
            return
        pieces, call.pieces, call.waiting = call.pieces, [], None
        if given == rows * new and (len(pieces) == 1 or are_in_order(pieces, rows, new)):
            layer.record_experts(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        else:
            _place_by_position(layer)

    def _running(self, layer_idx: int) -> LayerCall | None:
        """Return the innermost forward of a layer; one whose router is in a later block runs as long as the model."""
        for call in reversed(self._stack):
            if call.layer_idx == layer_idx:
                return call
        return None

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


def are_in_order(pieces: list[torch.Tensor], rows: int, new: int) -> bool:
    """Return whether what was chosen piece by piece, for `new` tokens of each row, is one row after the other.

    Of a batch a piece may have some tokens of every row, which nothing tells from all tokens of some.
    """
    return len(pieces) == 1 or 1 in (rows, new) or any(piece.numel() % rows for piece in pieces)


def _place_by_position(layer: LinkedLayer) -> None:
    rows, new = layer.awaited
    layer.record_experts(torch.full((rows * new,), -1))
    _warn_by_position()


@functools.cache
def _warn_by_position() -> None:
    """Warn, once in a process, of tokens whose experts are not known although the model has chosen them."""
    warnings.warn(
        "The model's router was given some of a call's tokens at a time, or not all of them, and which ones is not "
        "known: they are placed by position, as with placement='hash'. No placement changes a result. (Said once.)",
        stacklevel=2,
    )
