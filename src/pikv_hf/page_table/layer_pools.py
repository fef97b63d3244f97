"""The pools of one layer on one device: that of pages kept as they came, and those of packed pages."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.tensors import is_out_of_memory, live_bytes
from ..config import PiKVConfig
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from ..tiers.file_records import PageFileError
from ..tiers.tier_limits import LayerTiers, TierFull
from ..tiers.tiered_pool import TieredPool
from .layer_encoders import LayerEncoders
from .sequence_pages import SequencePages, distinct_sequences


class LayerPools:
    """All page pools of one layer on one device.

    Parameters
    ----------
    plain : PlainPool
        Window, open pages, and full pages that no codec took.
    config : PiKVConfig
        Codecs and error budget.
    tiers : LayerTiers, optional
        Where full pages may go. Those that no codec packs then have a pool of their own too.

    Attributes
    ----------
    packed : dict
        Pools of packed pages; each is made when the first page comes.
    encoders : LayerEncoders
        What encodes full pages, and what it keeps beside them.
    holders : dict
        The rows of each table over these pools, by identity, until their references are dropped: a table that is gone
        has its until then.
    numbering : int
        How often pages were given other numbers.
    abandoned : deque
        Rows of page tables that are gone, which still count as holders of their pages.
    freed : bool
        Whether pages may have become free since memory was last given back.
    """

    def __init__(self, plain: PlainPool, config: PiKVConfig, tiers: LayerTiers | None = None) -> None:
        if tiers is not None:
            tiers.check_device(plain.device)
            tiers.check_limit(plain.page_bytes)
        self.plain = plain
        self.tiers = tiers
        self.packed: dict[PoolId, PackedPool] = {}
        self.abandoned: deque[list[SequencePages]] = deque()
        self.config = config
        self.encoders = LayerEncoders(plain, config, uncoded_too=tiers is not None)
        self.holders: dict[int, list[SequencePages]] = {}
        self.numbering = 0
        self.freed = False

    def by_id(self) -> dict[PoolId, PagePool]:
        """Return all pools, the plain one first."""
        return {PLAIN: self.plain, **self.packed}

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that holds this layer's stored tokens or serves them."""
        return [*(tensor for pool in self.by_id().values() for tensor in pool.tensors()), *self.encoders.tensors()]

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        return sum(pool.host_bytes for pool in self.by_id().values())

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, with the numbers that tables have of the pages."""
        # A free page has none yet, and will.
        numbers = 8 * sum(int(np.maximum(pool.allocator.refcount, 1).sum()) for pool in self.by_id().values())
        return live_bytes(self.tensors()) + self.host_bytes + numbers

    # References

    def incref(self, sequence: SequencePages) -> None:
        """Add a reference to every page of a sequence."""
        for pool_id, pool in self.by_id().items():
            pool.incref(sequence.pages(pool_id))

    def decref(self, sequence: SequencePages) -> None:
        """Drop a reference to every page of a sequence."""
        self.freed = True
        for pool_id, pool in self.by_id().items():
            pool.decref(sequence.pages(pool_id))

    def release_abandoned(self) -> None:
        """Give back the pages of page tables that are gone, outside of any transaction.

        Python finds out that an object is gone at any time and in any thread, also while another changes these pools.
        """
        while self.abandoned:
            rows = self.abandoned.popleft()
            del self.holders[id(rows)]
            for sequence in distinct_sequences(rows):
                self.decref(sequence)

    def add_packed(self, sequence: SequencePages, pool_id: PoolId, ids: PageIds) -> None:
        """Give packed pages to a sequence, with a reference to each."""
        sequence.packed = {**sequence.packed, pool_id: np.append(sequence.pages(pool_id), ids)}
        self.packed[pool_id].incref(ids)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo every change of counts and references, in all pools, if the block raises."""
        before = dict(self.packed)
        with ExitStack() as stack:
            for pool in self.by_id().values():
                stack.enter_context(pool.transaction())
            try:
                yield
            except BaseException:
                made, self.packed = self.packed, before
                retire(made[pool_id] for pool_id in made.keys() - before.keys())
                raise

    # Giving memory back

    def compact(self, pool_id: PoolId) -> None:
        """Give back all free pages of a pool; see :meth:`give_back`."""
        self._renumber(pool_id, self.by_id()[pool_id].compact)

    def give_back(self, always: bool = True) -> None:
        """Give back free pages where these are many; see :meth:`PagePool.give_back`.

        Not within an operation that has page numbers at hand: pages get others, in all tables. Where memory for a
        smaller pool is lacking it stays as it is. Without `always` only if tables have let go of pages.
        """
        self.release_abandoned()
        if not always and not self.freed:
            return
        self.freed = False
        rows = len(distinct_sequences(itertools.chain(*self.holders.values())))
        for pool_id, pool in self.by_id().items():
            self._renumber(pool_id, partial(pool.give_back, rows))

    def _renumber(self, pool_id: PoolId, compact: Callable[[], PageIds | None]) -> None:
        """Compact a pool, and tell all tables the new numbers of its pages."""
        number = None
        try:
            number = compact()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) and not isinstance(error, (PageFileError, TierFull)):
                raise
        if number is not None:
            for sequence in distinct_sequences(itertools.chain(*self.holders.values())):
                sequence.renumber(pool_id, number)
            self.numbering += 1

    # Pools

    def packed_pool(self, key_codec: Codec, value_codec: Codec) -> PackedPool:
        """Return the pool of pages of these codecs, made when it is first asked for."""
        pool_id = PoolId(key_codec.name, value_codec.name)
        if pool_id not in self.packed:
            if self.tiers is None:
                self.packed[pool_id] = PackedPool(self.plain, key_codec, value_codec)
            else:
                self.packed[pool_id] = TieredPool(self.plain, key_codec, value_codec, self.tiers)
            self._prepare(self.packed[pool_id])
        return self.packed[pool_id]

    def _prepare(self, pool: PagePool) -> None:
        pool.growth_limit = self.plain.growth_limit
        if self.plain.usage is not None:
            pool.keep_usage(self.plain.usage.now)
        if self.plain.bounds is not None:
            pool.keep_bounds()
        if self.plain.codes is not None:
            pool.keep_codes()

    def limit_growth(self, growth_limit: Callable[[], int]) -> None:
        """Let pools grow only by the bytes that `growth_limit` returns."""
        self.plain.growth_limit = growth_limit
        for pool in self.packed.values():
            self._prepare(pool)

    def set_rotary_values(self, are_rotary: bool) -> None:
        """Say whether values are the rotary parts of the keys, before any bounds are kept."""
        for pool in self.by_id().values():
            assert pool.bounds is None
            pool.rotary_values = are_rotary

    def keep_bounds(self) -> None:
        """Keep bounds of the keys of all pages from now on."""
        for pool in self.by_id().values():
            pool.keep_bounds()

    def keep_codes(self) -> None:
        """Keep the keys of all pages in 2 bits from now on."""
        for pool in self.by_id().values():
            pool.keep_codes()

    def keep_usage(self, now: int) -> None:
        """Keep usage counters of all pages, from step `now` on."""
        for pool in self.by_id().values():
            pool.keep_usage(now)

    def forget_pools(self, known: set[PoolId]) -> None:
        """Delete the unused pools but those `known`, and with them bases fitted to tokens that are gone."""
        self.release_abandoned()
        for pool_id in set(self.packed) - known:
            if not self.packed[pool_id].allocator.refcount.any():
                pool = self.packed.pop(pool_id)
                retire([pool])
                self.encoders.forget(pool.key_codec, pool.value_codec)


def retire(pools: Iterable[PagePool]) -> None:
    """Give back what pools that are not used again hold of the tiers."""
    for pool in pools:
        if isinstance(pool, TieredPool):
            pool.retire()
