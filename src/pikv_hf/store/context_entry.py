"""A stored context: a cache that is only ever forked, and the bytes that are there for it alone."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..cache import PiKVCache
from ..layer.layer import PiKVLayer
from ..layer.layer_list import paged_layers
from ..layer.layer_operation import layer_operation
from ..layer.own_layer import tensors_of
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable


@dataclasses.dataclass(slots=True)
class ContextEntry:
    """K/V of a known sequence of tokens.

    Attributes
    ----------
    cache : PiKVCache
        Of one row; nothing is ever read into it.
    nbytes : int
        Of what the entry above it in the tree does not hold too.
    uses : int
        How often it was handed out.
    age : float
        See :mod:`pikv_hf.store.eviction_value`; as of its last use.
    """

    cache: PiKVCache
    nbytes: int = 0
    uses: int = 0
    age: float = 0.0


class HeldPools:
    """The pools that entries have pages in, and how much of them is free; entries that are forks have the same."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._holders: dict[int, _Holder] = {}

    def add(self, cache: PiKVCache) -> None:
        """Count the pools of one more entry."""
        for table in tables_of(cache):
            number = id(table.pools)
            self._counts[number] = self._counts.get(number, 0) + 1
            self._holders[number] = _Holder(table.pools, cache.lock)

    def remove(self, cache: PiKVCache) -> None:
        """Count the pools of an entry no longer."""
        for table in tables_of(cache):
            number = id(table.pools)
            self._counts[number] -= 1
            if not self._counts[number]:
                del self._counts[number], self._holders[number]

    def free_bytes(self, most: int | None = None) -> int:
        """Return the bytes of pages that nobody holds, after giving back many, or all where they are above `most`."""
        free = sum(map(_free_bytes, self._holders.values()))
        if most is not None and free > most:
            for holder in self._holders.values():
                _compact(holder)
            free = sum(map(_free_bytes, self._holders.values()))
        return free


@dataclasses.dataclass(frozen=True, slots=True)
class _Holder:
    """Pools, and the lock of the caches that use them."""

    pools: LayerPools
    lock: AbstractContextManager[Any]


@layer_operation
def _free_bytes(holder: _Holder) -> int:
    holder.pools.give_back()
    return sum(pool.full_page_bytes * pool.allocator.free_pages for pool in holder.pools.by_id().values())


@layer_operation
def _compact(holder: _Holder) -> None:
    for pool_id in holder.pools.by_id():
        holder.pools.compact(pool_id)


def tables_of(cache: PiKVCache) -> Iterator[PageTable]:
    """Yield the page tables of all parts of all paged layers that have tokens."""
    for layer in paged_layers(cache.layers):
        yield from layer.store.tables()


@layer_operation
def bytes_beyond(cache: PiKVCache, above: PiKVCache | None) -> int:
    """Return the bytes that a cache holds and another one does not: its own pages, tensors and page numbers."""
    if above is not None and above.lock is not cache.lock:
        # No fork of it: they share nothing.
        above = None
    others = {} if above is None else {id(table.pools): table for table in tables_of(above)}
    total = 0
    for table in tables_of(cache):
        other = others.get(id(table.pools))
        total += table.host_bytes
        for pool_id, pool in table.pools.by_id().items():
            own = table.distinct_pages(pool_id)
            shared = 0 if other is None else np.isin(own, other.distinct_pages(pool_id), assume_unique=True).sum()
            total += pool.full_page_bytes * int(len(own) - shared)
    held = set() if above is None else set(_storages(above))
    return total + sum(nbytes for place, nbytes in dict.fromkeys(_storages(cache)) if (place, nbytes) not in held)


def is_croppable(cache: PiKVCache) -> bool:
    """Return whether the first tokens of a cache are, at every length, what reading them alone would have stored.

    States and sliding windows have gone on from what they were, and what was evicted was chosen by later tokens.
    """
    layers = paged_layers(cache.layers)
    changed = any(layer.state.evicted or layer.state.assigned or layer.state.dropped for layer in layers)
    return not changed and not any(map(tensors_of, _unpaged(cache)))


def _unpaged(cache: PiKVCache) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, PiKVLayer)]


def _storages(cache: PiKVCache) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of the memory of the layers that are not paged."""
    for layer in _unpaged(cache):
        for tensor in tensors_of(layer).values():
            storage = tensor.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
