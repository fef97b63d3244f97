"""Tokens that kvpress's head-wise presses mark on the attention module instead of removing them.

A mark does not say whose token it is. So it is noted which layer of which cache a module has read last: only that one
takes the marks, once, and evicts the tokens.
"""

import sys
import weakref
from typing import Any

from torch import nn

_ATTRIBUTE = "masked_key_indices"
_readers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def note_reader(module: nn.Module, layer: Any, prompt: bool) -> None:
    """Note that an attention module reads a layer of a cache, None for a cache that is not PiKV's.

    A prompt ends what was marked during an earlier one, as in kvpress's own wrapper of attention functions; some of its
    presses expect the attribute to be there.
    """
    if layer is None:
        _readers.pop(module, None)
        return
    _readers[module] = weakref.ref(layer)
    if prompt and "kvpress" in sys.modules:
        setattr(module, _ATTRIBUTE, None)


def take_marks(module: nn.Module | None, layer: Any) -> Any:
    """Return, once, `(rows, heads, columns)` of what is marked on the module that read this layer last, or None."""
    reader = None if module is None else _readers.get(module)
    if reader is None or reader() is not layer:
        return None
    marks = getattr(module, _ATTRIBUTE, None)
    if marks is not None:
        setattr(module, _ATTRIBUTE, None)
    return marks
