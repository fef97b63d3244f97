"""All pages of one layer on one device: those that keep tokens as they came, and those that codecs packed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..codecs.codec import Codec
from ..codecs.page_encoder import Encoded, PageEncoder
from ..config import PiKVConfig
from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import PackedPool
from ..pages.page_contents import PageContents
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, UNCODED, PoolId
from ..pages.types import PageIds
from ..reports.memory_report import live_bytes
from ..tiers.tier_limits import LayerTiers
from ..tiers.tiered_pool import TieredPool, retire

if TYPE_CHECKING:
    from ..scheduling.growth_limit import GrowthLimit
    from .sequence_pages import SequencePages


# The most queries of each KV head by which errors are judged.
MAX_OBSERVED = 64


class LayerPools:
    """The pools of a layer.

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
    queries : torch.Tensor or None
        `(H, m, D)`, the last queries that attended, by which errors are judged.
    query_scale : float
        Factor on their logits.
    encoders : tuple of PageEncoder or None
        What packs keys, and what packs values; None where pages stay as they came.
    """

    def __init__(self, plain: PlainPool, config: PiKVConfig, tiers: LayerTiers | None = None) -> None:
        if tiers is not None:
            tiers.check_device(plain.device)
            tiers.check_limit(plain.page_bytes)
        self.plain = plain
        self.tiers = tiers
        self.packed: dict[PoolId, PackedPool] = {}
        self.queries: torch.Tensor | None = None
        self.query_scale = 1.0
        self.config = config
        self.encoders: tuple[PageEncoder, PageEncoder] | None = None
        if tiers is not None or config.key_codec != "none" or config.value_codec != "none":
            self.encoders = (
                PageEncoder(config.key_codec, True, config),
                PageEncoder(config.value_codec, False, config),
            )

    @property
    def packs(self) -> bool:
        """Whether full pages leave the plain pool: packed, or as they came where there are tiers."""
        return self.encoders is not None

    def by_id(self) -> dict[PoolId, PagePool]:
        """Return all pools, the plain one first."""
        return {PLAIN: self.plain, **self.packed}

    def bases(self, keys: bool) -> list[torch.Tensor]:
        """Return what the codecs of keys, or of values, keep beside the pages."""
        if self.encoders is None:
            return []
        codecs = self.encoders[0 if keys else 1].codecs.values()
        return [codec.basis for codec in codecs if codec.basis is not None]

    def set_bases(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Give low-rank codecs their bases `(H, D, rank)` instead of having them fitted."""
        dims = self.plain.keys.shape[-1], self.plain.values.shape[-1]
        for encoder, basis, dim in zip(self.encoders or (), (keys, values), dims, strict=False):
            codec = encoder.codec(encoder.rungs[0], dim)
            if codec.is_lowrank and basis is not None:
                codec.basis = basis

    def inherit(self, other: "LayerPools") -> None:
        """Go on with the bases that another store of these heads has fitted: its pages may move here."""
        for mine, theirs in zip(self.encoders or (), other.encoders or (), strict=False):
            mine.codecs.update({name: codec for name, codec in theirs.codecs.items() if codec.basis is not None})

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that holds this layer's stored tokens or serves them."""
        held = [tensor for pool in self.by_id().values() for tensor in pool.tensors()]
        return [*held, *self.bases(True), *self.bases(False), *([] if self.queries is None else [self.queries])]

    @property
    def most_beside(self) -> int:
        """The most bytes that are kept beside pages: queries to judge errors by, and bases of low-rank codecs."""
        heads, _, _, dim = self.plain.keys.shape
        size, most = self.plain.keys.element_size(), 0
        if self.encoders is not None:
            most = heads * MAX_OBSERVED * dim * size
            for encoder, width in zip(self.encoders, (dim, self.plain.values.shape[-1]), strict=True):
                most += heads * width * min(width, encoder.codec(encoder.rungs[0], width).rank) * size
        return most

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

    def incref(self, sequence: "SequencePages") -> None:
        """Add a reference to every page of a sequence."""
        for name, pool in self.by_id().items():
            pool.incref(sequence.pages(name))

    def decref(self, sequence: "SequencePages") -> None:
        """Drop a reference to every page of a sequence."""
        for name, pool in self.by_id().items():
            pool.decref(sequence.pages(name))

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
                retire(made[name] for name in made.keys() - before.keys())
                raise

    # Packing

    def remember_queries(self, queries: torch.Tensor, scale: float) -> None:
        """Remember queries `(H, m, D)` to judge errors by."""
        self.queries, self.query_scale = queries, scale

    def is_ready(self, pages: int) -> bool:
        """Return whether so many full pages could be packed now."""
        tokens, dims = pages * self.plain.page_size, (self.plain.keys.shape[-1], self.plain.values.shape[-1])
        return self.encoders is not None and all(
            encoder.is_ready(tokens, dim) for encoder, dim in zip(self.encoders, dims, strict=True)
        )

    def pack_full(self, sequences: Sequence["SequencePages"]) -> None:
        """Pack the full pages of sequences, once for all of those that share them.

        Everything that may fail happens before anything changes.
        """
        full = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(s.full for s in sequences)]))
        full = full[~self.plain.incompressible[full]]
        if not len(full) or not self.is_ready(len(full)):
            return
        packed = self.pack(self.plain.contents(full))
        self.plain.incompressible[full] = True
        for name, (which, ids) in packed.items():
            leaving = full[which]
            self.plain.incompressible[leaving] = False
            pool = self.packed[name]
            if self.plain.usage is not None and pool.usage is not None:
                pool.usage.copy_from(self.plain.usage, self.plain.index(leaving), pool.index(ids))
            for sequence in sequences:
                moving = np.isin(sequence.full, leaving)
                old = sequence.full[moving]
                sequence.full = sequence.full[~moving]
                # In the order in which the sequence had them.
                self.give(sequence, name, ids[np.searchsorted(leaving, old)])
                self.plain.decref(old)

    def give(self, sequence: "SequencePages", pool: PoolId, ids: PageIds) -> None:
        """Add packed pages to a sequence."""
        sequence.packed = {**sequence.packed, pool: np.append(sequence.pages(pool), ids)}
        self.packed[pool].incref(ids)

    def pack(self, pages: PageContents, codec: str | None = None) -> dict[PoolId, tuple[np.ndarray, PageIds]]:
        """Encode full pages.

        Parameters
        ----------
        pages : PageContents
            What to encode.
        codec : str, optional
            One of `LADDER`, to put all pages into it, whatever its error; by default the configured codecs.

        Returns
        -------
        dict
            By pool: which of the pages it took, ascending, and their numbers there, yet without a holder.
            Pages that no codec could hold well enough are in none.
        """
        guarded = codec is None
        encoders = self.encoders if codec is None else (self._encoder(codec, True), self._encoder(codec, False))
        assert encoders is not None
        keys = encoders[0].encode(pages.keys, self.queries, self.query_scale, guarded)
        values = encoders[1].encode(pages.values, None, 1.0, guarded)
        every = codec is not None or self.tiers is not None
        pairs = [_Batch(k, v) for k in keys for v in values if every or PoolId(k.codec.name, v.codec.name) != UNCODED]
        batches = [batch for batch in pairs if len(batch.which)]
        for batch in batches:
            self.packed_pool(batch.keys.codec, batch.values.codec).reserve(len(batch.which))
        packed = {}
        for batch in batches:
            pool = self.packed_pool(batch.keys.codec, batch.values.codec)
            # Without a holder: should the rest fail, nothing is lost, and nobody else allocates in between.
            ids = pool.allocate(len(batch.which), holders=0)
            # Before the pages are written: tiers have a file for each shard.
            pool.shard[ids] = pages.shards[batch.which]
            pool.put(ids, *batch.codes(pool))
            index, source = pool.index(ids), pool.index(batch.which)
            pool.positions.index_copy_(0, index, pages.positions.index_select(0, source))
            packed[pool.id] = batch.which, ids
        for name, (_, ids) in packed.items():
            self.packed[name].count[ids] = self.plain.page_size
        return packed

    def _encoder(self, codec: str, keys: bool) -> PageEncoder:
        return PageEncoder(codec, keys, self.config)

    def adopt(
        self, source: PackedPool, pages: np.ndarray, keys: PageCodes, values: PageCodes
    ) -> tuple[PoolId, PageIds]:
        """Take over encoded pages of another store.

        Parameters
        ----------
        source : PackedPool
            Where they come from; its codecs go on to decode them.
        pages : numpy.ndarray
            `(n,)`, their numbers there, for what is known of their errors.
        keys, values : PageCodes
            n pages in this store's heads.

        Returns
        -------
        tuple
            The pool, and the pages' numbers `(n,)` there, yet without a holder or tokens.
        """
        pool = self.packed_pool(source.key_codec, source.value_codec)
        ids = pool.allocate(len(pages), holders=0)
        pool.shard[ids] = source.shard[pages]
        # Errors are sums over heads.
        share = np.array([*[self.plain.keys.shape[0] / source.keys.heads] * 4, 1.0], dtype=np.float32)
        pool.put(ids, keys.tensors(), values.tensors(), source.errors[pages] * share)
        return pool.id, ids

    def packed_pool(self, key_codec: Codec, value_codec: Codec) -> PackedPool:
        """Return the pool of pages of these codecs, made when it is first asked for."""
        which = PoolId(key_codec.name, value_codec.name)
        if which not in self.packed:
            if self.tiers is None:
                self.packed[which] = PackedPool(self.plain, key_codec, value_codec)
            else:
                self.packed[which] = TieredPool(self.plain, key_codec, value_codec, self.tiers)
            self._prepare(self.packed[which])
        return self.packed[which]

    def _prepare(self, pool: PagePool) -> None:
        pool.growth_limit = self.plain.growth_limit
        if self.plain.usage is not None:
            pool.keep_usage(self.plain.usage.now)
        if self.plain.bounds is not None:
            pool.keep_bounds()

    def limit(self, growth_limit: "GrowthLimit") -> None:
        """Let pools grow only by the bytes that `growth_limit` returns."""
        self.plain.growth_limit = growth_limit
        for pool in self.packed.values():
            self._prepare(pool)

    def keep_bounds(self) -> None:
        """Have a place for the bounds of all pages from now on."""
        for pool in self.by_id().values():
            pool.keep_bounds()

    def keep_usage(self, now: int) -> None:
        """Keep statistics of use of all pages, from step `now` on."""
        for pool in self.by_id().values():
            pool.keep_usage(now)

    def forget_pools(self, known: set[PoolId]) -> None:
        """Drop the pools that nobody uses but those `known`, and with them bases fitted to tokens that are gone."""
        for name in set(self.packed) - known:
            if not self.packed[name].allocator.refcount.any():
                pool = self.packed.pop(name)
                retire([pool])
                for encoder, codec in zip(self.encoders or (), (pool.key_codec, pool.value_codec), strict=False):
                    if encoder.codecs.get(codec.name) is codec:
                        del encoder.codecs[codec.name]

    def reserve_packed(self, pages: int) -> None:
        """Make room for packed pages of a prompt, where it is known which codec will take them."""
        if self.encoders is not None and all(encoder.name != "auto" for encoder in self.encoders):
            dims = self.plain.keys.shape[-1], self.plain.values.shape[-1]
            codecs = [s.codec(s.rungs[0], dim) for s, dim in zip(self.encoders, dims, strict=True)]
            self.packed_pool(*codecs).reserve(pages)


class _Batch:
    """Pages whose keys went to one codec and whose values went to one codec."""

    def __init__(self, keys: Encoded, values: Encoded) -> None:
        self.keys, self.values = keys, values
        self.which, self._in_keys, self._in_values = np.intersect1d(keys.which, values.which, return_indices=True)

    def codes(self, pool: PackedPool) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
        keys, values = self.keys.errors, self.values.errors
        k, v = self._in_keys, self._in_values
        errors = np.stack([keys.energy[k], keys.lost[k], values.energy[v], values.lost[v], keys.logits[k]], axis=1)
        picked = self.keys.codes.pick(pool.index(k)), self.values.codes.pick(pool.index(v))
        return picked[0].tensors(), picked[1].tensors(), errors
