"""A part of a layer that has no memory for more pages."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

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
