"""Operations that fail where a test wants them to: for want of memory, of disk space, or interrupted."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.pages.page_pool import PagePool


@contextlib.contextmanager
def no_memory_for(layer: PiKVLayer, part: int) -> Iterator[list[int]]:
    """Let the pools of one part grow no more; yields a list that is not empty once one has tried."""
    pools, tried, grow = set(map(id, layer.parts[part].table.pools.by_id().values())), [], PagePool._grow

    def guarded(pool: Any, extra: int) -> None:
        if id(pool) in pools:
            tried.append(extra)
            raise MemoryError("the test's own")
        grow(pool, extra)

    with mock.patch.object(PagePool, "_grow", guarded):
        yield tried


class FailingOnce(TorchDispatchMode):
    """Let one operation on tensors, or one write to a file, fail; those after it succeed.

    Parameters
    ----------
    number : int
        Which, counted from 0.
    error : BaseException
        What it raises.

    Attributes
    ----------
    has_failed : bool
        Whether there were so many.
    """

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error, self.has_failed = number, error, False

    def count(self) -> None:
        """Count an operation, and fail if it is the one."""
        self.left -= 1
        if self.left == -1:
            self.has_failed = True
            raise self.error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count()
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what happens in the block."""
        write = os.pwrite

        def pwrite(*args: Any) -> int:
            if not isinstance(self.error, KeyboardInterrupt | OSError):
                return write(*args)
            self.count()
            return write(*args)

        with mock.patch.object(os, "pwrite", pwrite), self:
            yield
