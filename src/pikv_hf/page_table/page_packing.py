"""Moving full pages from the plain pool of a layer into its packed pools, encoded."""

from collections.abc import Sequence

import numpy as np

from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import PackedPool
from ..pages.page_contents import PageContents
from ..pages.pool_id import PoolId
from ..pages.types import PageIds
from .layer_pools import LayerPools
from .sequence_pages import SequencePages

#: Encoded pages by pool: which of the pages it took, ascending, and their numbers there.
PackedPages = dict[PoolId, tuple[np.ndarray, PageIds]]


def pack_full(pools: LayerPools, sequences: Sequence[SequencePages]) -> None:
    """Pack the full pages of sequences, once for all of those that share them.

    Everything that may fail happens before anything changes.
    """
    plain = pools.plain
    full = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(s.full for s in sequences)]))
    full = full[~plain.incompressible[full]]
    if not len(full) or not pools.encoders.is_ready(len(full) * plain.page_size):
        return
    packed = pack_pages(pools, plain.contents(full))
    plain.incompressible[full] = True
    for pool_id, (which, ids) in packed.items():
        leaving = full[which]
        plain.incompressible[leaving] = False
        pool = pools.packed[pool_id]
        if plain.usage is not None and pool.usage is not None:
            pool.usage.copy_from(plain.usage, plain.index(leaving), pool.index(ids))
        for sequence in sequences:
            moving = np.isin(sequence.full, leaving)
            old = sequence.full[moving]
            sequence.full = sequence.full[~moving]
            # In the order in which the sequence had them.
            pools.add_packed(sequence, pool_id, ids[np.searchsorted(leaving, old)])
            plain.decref(old)


def pack_pages(pools: LayerPools, pages: PageContents, codec: str | None = None) -> PackedPages:
    """Encode full pages into packed pools.

    Parameters
    ----------
    pools : LayerPools
        Where they go.
    pages : PageContents
        What to encode.
    codec : str, optional
        One of `LADDER`, to put all pages into it, whatever its error; by default the configured codecs.

    Returns
    -------
    dict
        See :data:`PackedPages`. Nobody holds the pages yet. Those that no codec could hold well enough are in no pool.
    """
    batches = pools.encoders.encode(pages, codec)
    for batch in batches:
        pools.packed_pool(batch.keys.codec, batch.values.codec).reserve(len(batch.which))
    packed = {}
    for batch in batches:
        pool = pools.packed_pool(batch.keys.codec, batch.values.codec)
        ids = _unheld(pool, pages.shards[batch.which])
        pool.put(ids, *batch.codes(pool.device))
        index, source = pool.index(ids), pool.index(batch.which)
        pool.positions.index_copy_(0, index, pages.positions.index_select(0, source))
        packed[pool.id] = batch.which, ids
    for pool_id, (_, ids) in packed.items():
        pools.packed[pool_id].count[ids] = pools.plain.page_size
    return packed


def adopt_pages(
    pools: LayerPools, source: PackedPool, pages: PageIds, keys: PageCodes, values: PageCodes
) -> tuple[PackedPool, PageIds]:
    """Take over encoded pages from the pool of another page table.

    Parameters
    ----------
    pools : LayerPools
        Where they go.
    source : PackedPool
        Where they come from; its codecs go on to decode them.
    pages : numpy.ndarray
        `(n,)`, their numbers there, for what is known of their errors.
    keys, values : PageCodes
        n pages in the heads of `pools`.

    Returns
    -------
    tuple
        The pool, and the pages' numbers `(n,)` there, yet without a holder or tokens.
    """
    pool = pools.packed_pool(source.key_codec, source.value_codec)
    ids = _unheld(pool, source.shard[pages])
    # Errors are sums over heads.
    share = np.array([*[pools.plain.keys.shape[0] / source.keys.heads] * 4, 1.0], dtype=np.float32)
    pool.put(ids, keys.tensors(), values.tensors(), source.errors[pages] * share)
    return pool, ids


def _unheld(pool: PackedPool, shards: np.ndarray) -> PageIds:
    """Allocate a page for each of `shards` `(n,)`, which nobody holds yet."""
    # Without a holder: should the rest fail, nothing is lost, and nobody else allocates in between.
    ids = pool.allocate(len(shards), holders=0)
    # Before the pages are written: tiers have a file for each shard.
    pool.shard[ids] = shards
    return ids


def reserve_packed(pools: LayerPools, pages: int) -> None:
    """Make room for packed pages of a prompt, where it is known which codec will take them."""
    if (codecs := pools.encoders.only_codecs) is not None:
        pools.packed_pool(*codecs).reserve(pages)
