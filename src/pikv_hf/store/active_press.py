"""Whether a press is at work on a model: what is read meanwhile is not what the tokens alone would give."""

from collections.abc import Iterable
from typing import Any

from torch import nn

_FROM = ("kvpress", "pikv_hf.presses")


def has_press(modules: Iterable[nn.Module]) -> bool:
    """Return whether any attention module has a hook of a press, kvpress's, this project's or derived from theirs."""
    return any(
        _is_of_press(hook)
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _is_of_press(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None))
    origins = [getattr(hook, "__module__", None) or "", *(each.__module__ for each in owner.__mro__)]
    return any(origin == name or origin.startswith(f"{name}.") for origin in origins for name in _FROM)
