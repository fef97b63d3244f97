"""Counting the hooks on a model's modules."""

from typing import Any


def hooks_of(model: Any) -> int:
    """Return how many hooks the modules of a model have, before and after their forward."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
