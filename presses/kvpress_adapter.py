"""Lets kvpress's own presses work with releases of transformers that call attention by other names.

kvpress 0.5.5 was written for transformers 5.2, whose models call attention with `past_key_values` and `cache_position`.
Newer ones call the cache `cache` and give no positions, and every press of kvpress ends in a `KeyError`. Importing
:mod:`pikv_hf.presses` installs this adapter; :func:`remove` undoes it. Where kvpress works by itself, nothing is done.

Hooks of presses are shown both names, and the positions that a model of 5.2 would have given: from the length of the
cache before the call, which is noted when the decoder is called. That is asked of the first layer once, since layers
whose tokens have all been evicted look as if they had read nothing. What attention is called with does not change.
"""

import functools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from pikv_hf.common.transformers_release import CACHE_ARGUMENT, OLD_CACHE_ARGUMENT, arguments_of_layers, cache_of_call
from pikv_hf.presses.press_base import KVPRESS, decoder_of

#: The names that presses of kvpress look for.
_OLD_CACHE, _POSITIONS = OLD_CACHE_ARGUMENT, "cache_position"
#: The attribute of a method of this file that has kvpress's own.
_ORIGINAL = "_pikv_kvpress_original"


class _RunningCalls(threading.local):
    """The decoder calls of a thread that have not ended: their caches, and how long these were before."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int]] = []


_running = _RunningCalls()


def is_needed() -> bool:
    """Return whether kvpress is there and this release of transformers does not name what its presses look for."""
    return KVPRESS is not None and not {_OLD_CACHE, _POSITIONS} <= arguments_of_layers()


def is_installed() -> bool:
    """Return whether presses of kvpress are adapted now."""
    return KVPRESS is not None and hasattr(KVPRESS.BasePress.__dict__["forward_hook"], _ORIGINAL)


def install() -> None:
    """Adapt all presses of kvpress, also a user's own and those that are yet to be made, if that is needed."""
    if not is_needed() or is_installed():
        return
    for kind in _with_subclasses(KVPRESS.BasePress):
        _adapt(kind)
    KVPRESS.BasePress.__init_subclass__ = classmethod(_adapt_new)
    _replace(_read_only_layer(), "update", _adapted_update)


def remove() -> None:
    """Give kvpress its own methods back. Blocks that are open stay adapted until they end."""
    if not is_installed():
        return
    del KVPRESS.BasePress.__init_subclass__
    for kind in (*_with_subclasses(KVPRESS.BasePress), _read_only_layer()):
        for name, method in list(vars(kind).items()):
            if (original := getattr(method, _ORIGINAL, None)) is not None:
                setattr(kind, name, original)


def _with_subclasses(kind: Any) -> Iterator[type]:
    yield kind
    for below in kind.__subclasses__():
        yield from _with_subclasses(below)


def _adapt_new(kind: type, **options: Any) -> None:
    """Adapt a subclass of kvpress's `BasePress` when it is made."""
    super(KVPRESS.BasePress, kind).__init_subclass__(**options)
    _adapt(kind)


def _adapt(kind: type) -> None:
    """Put adapted methods in place of those that a class itself has. This project's know all names."""
    if kind.__module__.startswith("pikv_hf."):
        return
    for name, adapted in (("forward_hook", _adapted_hook), ("__call__", _adapted_block)):
        if name in vars(kind):
            _replace(kind, name, adapted)


def _replace(kind: type, name: str, adapted: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Adapt a method of a class, once."""
    original = vars(kind)[name]
    if not hasattr(original, _ORIGINAL):
        method = adapted(original)
        setattr(method, _ORIGINAL, original)
        setattr(kind, name, method)


def _adapted_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward_hook` that is given both names."""

    @functools.wraps(original)
    def forward_hook(self: Any, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return original(self, module, input, with_old_names(module, kwargs), output)

    return forward_hook


def with_old_names(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an attention's arguments, after its call, with what presses of kvpress look for in them.

    Parameters
    ----------
    module : nn.Module
        The attention.
    kwargs : dict
        As given; what has the names already, or no cache, is returned as it is.
    """
    cache = cache_of_call(kwargs)
    if cache is None or (_OLD_CACHE in kwargs and _POSITIONS in kwargs):
        return kwargs
    shown = {_OLD_CACHE: cache, **kwargs}
    if _POSITIONS not in kwargs and isinstance(hidden := kwargs.get("hidden_states"), torch.Tensor):
        before = _length_before(module, cache, hidden.shape[1])
        shown[_POSITIONS] = torch.arange(before, before + hidden.shape[1], device=hidden.device)
    return shown


def _length_before(module: nn.Module, cache: Any, new: int) -> int:
    """Return how long a cache was before the running call, or its layer before this call of its attention alone."""
    noted = next((length for known, length in reversed(_running.calls) if known is cache), None)
    if noted is not None:
        return noted
    return max(0, int(cache.layers[module.layer_idx].get_seq_length()) - new)


def _adapted_block(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `__call__` within whose block the decoder's calls are noted."""

    @functools.wraps(original)
    @contextmanager
    def __call__(self: Any, model: Any) -> Generator[None, None, None]:
        with _noted(decoder_of(model)), original(self, model):
            yield

    return __call__


@contextmanager
def _noted(decoder: nn.Module) -> Generator[None, None, None]:
    """Note the calls of a decoder within the block."""
    handles = [
        decoder.register_forward_pre_hook(_begin, with_kwargs=True),
        decoder.register_forward_hook(_end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _begin(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note the cache of a call and its length; give a press that replaced `forward` the name that it knows."""
    cache = cache_of_call(kwargs)
    if cache is None:
        cache = next((given for given in args if isinstance(given, Cache)), None)
    _running.calls.append((cache, 0 if cache is None else int(cache.get_seq_length())))
    given = dict(kwargs)
    # RestoreKVPress gives it, and so it would reach the attention function.
    given.pop(_POSITIONS, None)
    if _is_replaced(decoder) and CACHE_ARGUMENT in given:
        given[_OLD_CACHE] = given.pop(CACHE_ARGUMENT)
    return args, given


def _end(*called: Any) -> None:
    """Forget a call that has ended, or failed."""
    _running.calls.pop()


def _is_replaced(decoder: nn.Module) -> bool:
    """Return whether a press of kvpress has put its own function in place of the decoder's, as KVzip and KVCompose."""
    forward = getattr(vars(decoder).get("forward"), "__func__", None)
    forward = getattr(forward, "func", forward)
    return str(getattr(forward, "__module__", "")).startswith("kvpress.")


def _read_only_layer() -> type:
    """Return the layer of a cache that KVgradPress puts in place of others while it reads them."""
    from kvpress.presses.kvgrad_press import ReadOnlyDynamicLayer

    return ReadOnlyDynamicLayer


def _adapted_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `update` of a layer that takes what newer caches hand on, as `kwargs=`, and passes over it."""

    @functools.wraps(original)
    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, keys, values)

    return update
