"""The layer of a cache whose attention runs now, in this thread, for where keys and values do not lead to it."""

import threading
import weakref
from typing import Any

from torch import nn
from transformers import Cache

from ..layer.layer import PiKVLayer
from .attention_calls import layer_of_call


class _Running(threading.local):
    cache: "weakref.ref[Any] | None" = None


_running = _Running()


def note_running(cache: Any) -> None:
    """Note with which cache, or with None, an attention module begins."""
    _running.cache = weakref.ref(cache) if isinstance(cache, Cache) else None


def check_running_was_read(module: nn.Module) -> None:
    """Do as :func:`check_was_read` for an attention module that runs, if it is what began last."""
    check_was_read(module, None if _running.cache is None else _running.cache())


def check_was_read(module: nn.Module, cache: Any) -> None:
    """Take back the tokens of a call, and raise `ValueError`, if attention has not read what it was referred to.

    All layers give out all K/V from then on, until a reference reaches attention again.
    """
    layer = layer_of_call(getattr(module, "layer_idx", -1), cache)
    if not isinstance(layer, PiKVLayer) or not layer.store.state.reference_out or not layer.reference.is_unread:
        return
    layer.rollback(1 if layer.pending is None else layer.pending.tokens)
    for each in cache.layers:
        if isinstance(each, PiKVLayer):
            each.state.reference_lost |= each.seen > 0 and not each.state.evicted
    after = "cannot be given all K/V, since tokens were evicted" if layer.state.evicted else "will be given all K/V"
    raise ValueError(
        f"layer {layer.layer_idx}: attention goes on without the history that it was referred to: something has begun "
        "to change keys or values between the cache and attention, or to compute attention without transformers' "
        "interface. This layer has none of the call's tokens; take them back from those before it with "
        f"cache.crop({layer.state.positions_seen}). Called again, attention {after}"
    )
