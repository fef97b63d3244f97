"""Models whose attention changes the keys that a cache has returned, so that they do not lead to the cache any more."""

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn


def warn_if_read_densely(modules: Mapping[int, nn.Module]) -> None:
    """Warn of attention modules, by layer, that lose the reference which a layer's keys carry."""
    layers = [index for index, module in modules.items() if replaces_cached_keys(type(module))]
    if layers:
        name = type(modules[layers[0]]).__name__
        warnings.warn(
            f"{name} changes keys between the cache and attention: {len(layers)} of {len(modules)} layers give it all "
            "their K/V, dense, in every step. Results are right; time is that of DynamicCache or more",
            stacklevel=5,
        )


@functools.cache
def replaces_cached_keys(attention: Any) -> bool:
    """Return whether an attention class gives the keys from `cache.update` another value before it attends.

    As JetMoE does, which repeats them. It is read from the source; without one, what happens in a call tells.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    updates = [node for node in assigned if _is_update(node.value) and isinstance(node.targets[0], ast.Tuple)]
    return any(
        node.lineno > update.lineno and not _is_update(node.value) and _keys_of(update) in _names(node)
        for update in updates
        for node in assigned
    )


def _is_update(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "update"


def _keys_of(update: ast.Assign) -> str:
    target = update.targets[0]
    assert isinstance(target, ast.Tuple)
    return ast.unparse(target.elts[0])


def _names(assignment: ast.Assign) -> set[str]:
    targets = [each for target in assignment.targets for each in getattr(target, "elts", [target])]
    return {ast.unparse(target) for target in targets}
