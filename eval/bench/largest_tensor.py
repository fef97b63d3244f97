"""The largest tensors that a step makes: those that are gone when it is over, and those that stay."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Largest:
    """The largest new storage of its kind: bytes, and the operation of torch that made it, `aten.cat.default` say."""

    nbytes: int = 0
    operation: str = ""


class NewTensors(TorchDispatchMode):
    """Within its block, notes every storage that an operation of torch makes anew.

    Views and what is written in place are not new. Scratch memory within an operation is not seen, that of compiled
    kernels neither.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, Largest]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its outputs."""
        # By address: those of arguments are taken, so that no new storage can have one of them.
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.data_ptr() not in known:
                self._made.append((StorageWeakRef(storage), Largest(storage.nbytes(), str(func))))
        return result

    def largest(self) -> tuple[Largest, Largest]:
        """Return the largest that is gone by now, and the largest that is still there."""
        found = [Largest(), Largest()]
        for reference, made in self._made:
            kind = 0 if reference.expired() else 1
            found[kind] = _larger(found[kind], made)
        return found[0], found[1]


def largest_of_calls(call: Callable[[int], object], numbers: range) -> tuple[Largest, Largest]:
    """Return the largest temporary of these calls, and the largest tensor that outlives the call that made it."""
    gone, stays = Largest(), Largest()
    for number in numbers:
        with NewTensors() as new:
            call(number)
        temporary, lasting = new.largest()
        gone, stays = _larger(gone, temporary), _larger(stays, lasting)
    return gone, stays


def _larger(one: Largest, other: Largest) -> Largest:
    return other if other.nbytes > one.nbytes else one


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
