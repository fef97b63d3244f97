"""Hooks on the modules of a model, which pickled and copied models come without."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class ModelHook(functools.partial[Any]):
    """A hook that serves this model alone.

    Modules are pickled and copied with their hooks, as `torch.save` and `copy.deepcopy` of a model do; those of an
    attached model report to its own caches, which a copy has none of. So a hook is copied as a :class:`CopiedHook`.
    It is a partial function, which costs no call of its own.
    """

    handle: RemovableHandle | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CopiedHook, (), {"handle": self.handle}


class CopiedHook:
    """What a copied or unpickled module has in place of a :class:`ModelHook`: with its first call it is gone."""

    handle: RemovableHandle | None = None

    def __call__(self, *call: Any) -> None:
        # When a forward has failed torch goes through the hooks themselves, not a copy: none may go meanwhile.
        if self.handle is not None and sys.exc_info()[0] is None:
            self.handle.remove()


def place_hook(
    register: Callable[..., RemovableHandle], work: Callable[..., Any], *given: Any, **options: bool
) -> RemovableHandle:
    """Let a module call a function, by one of its methods to register hooks and with the options of this method.

    What is `given` comes first among the function's arguments. Returns the handle that ends it.
    """
    hook = ModelHook(work, *given)
    hook.handle = register(hook, **options)
    return hook.handle
