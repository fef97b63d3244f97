"""What one part of a layer stores, as a file holds it: a description in plain values, and tensors of the pages in use.

Page numbers in a file count the pages in use of a pool, in order of their numbers in memory.
"""

from typing import Any

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.kv import KV
from ..layer.layer import PiKVLayer
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable
from ..pages.packed_pool import PackedPool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from .format import CODEC, ENCODERS, POOL, TABLE, TABLE_TENSORS, basis_name, described, pool_prefix
from .pool_records import describe_pool
from .tensor_writer import Group


def describe_table(prefix: str, layer: PiKVLayer, table: PageTable) -> tuple[dict[str, Any], list[Group]]:
    """Return what is written of a part's table, with names of tensors that begin with `prefix`."""
    pools, writer = table.pools, table.writer
    used = {pool_id: table.distinct_pages(pool_id) for pool_id in pools.by_id()}
    used = {pool_id: ids for pool_id, ids in used.items() if len(ids) or pool_id == PLAIN}
    codecs = _Codecs(pools, [pools.packed[pool_id] for pool_id in used if pool_id != PLAIN])
    descriptions, groups = [], codecs.bases(prefix)
    for pool_id, ids in used.items():
        pool = pools.by_id()[pool_id]
        description, group = describe_pool(pool_prefix(prefix, pool_id.name), pool, ids)
        keys, values = codecs.of_pool(pool) if isinstance(pool, PackedPool) else (None, None)
        descriptions.append(described(POOL, name=pool_id.name, key_codec=keys, value_codec=values, **description))
        groups.append(group)
    tensors = _sequences(table, used)
    if pools.encoders.queries is not None:
        tensors["queries"] = pools.encoders.queries
    assert set(tensors) <= set(TABLE_TENSORS)
    groups += [Group.of({f"{prefix}.{name}": tensor}) for name, tensor in tensors.items()]
    description = described(
        TABLE,
        heads=layer.store.heads,
        page_heads=pools.plain.keys.shape[0],
        key_dim=pools.plain.keys.shape[-1],
        value_dim=pools.plain.values.shape[-1],
        dtype=str(layer.store.dtype).removeprefix("torch."),
        config=pools.config.to_dict(),
        num_shards=writer.num_shards,
        recent_window=writer.recent_window,
        sink_pages=writer.sink_pages,
        codecs=codecs.descriptions,
        encoders=codecs.encoders,
        pools=descriptions,
        has_queries=pools.encoders.queries is not None,
        query_scale=float(pools.encoders.query_scale),
    )
    return description, groups


def _sequences(table: PageTable, used: dict[PoolId, PageIds]) -> dict[str, torch.Tensor]:
    """Return the rows and their pages.

    Returns
    -------
    dict of str to torch.Tensor
        All int64. `rows` `(R,)`: the sequence of each row. `open_pages` `(S, num_shards)`: the partly filled page of
        each shard, -1 for none. `page_counts` `(S, 1 + 1 + pools)`: how many pages are in the window, how many full
        ones in the plain pool, and how many in each pool of packed pages. `page_numbers`: these pages, one sequence
        after the other, in that order.
    """
    sequences = table.sequences()
    numbers = {id(sequence): number for number, sequence in enumerate(sequences)}
    renumbered = {pool_id: _renumbering(ids) for pool_id, ids in used.items()}
    ids, lengths = [np.zeros(0, dtype=np.int64)], []
    for sequence in sequences:
        window = np.asarray(sequence.window, dtype=np.int64)
        parts = [renumbered[PLAIN][window], renumbered[PLAIN][sequence.full]]
        parts += [renumbered[pool_id][sequence.pages(pool_id)] for pool_id in used if pool_id != PLAIN]
        ids += parts
        lengths.append([len(part) for part in parts])
    open_pages = np.array([sequence.open for sequence in sequences], dtype=np.int64).reshape(-1, table.num_shards)
    arrays = {
        "rows": np.array([numbers[id(row)] for row in table.rows], dtype=np.int64),
        # The last entry of a renumbering stands for -1.
        "open_pages": renumbered[PLAIN][open_pages],
        "page_counts": np.array(lengths, dtype=np.int64).reshape(-1, 1 + len(used)),
        "page_numbers": np.concatenate(ids),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _renumbering(used: PageIds) -> PageIds:
    """Return an array that maps the page numbers in memory, and -1, to those in the file."""
    mapping = np.full(int(used.max(initial=-1)) + 2, -1, dtype=np.int64)
    mapping[used] = np.arange(len(used))
    return mapping


class _Codecs:
    """The codecs of a part, by number: pools and the encoders of the next pages share them."""

    def __init__(self, pools: LayerPools, used: list[PackedPool]) -> None:
        encoders = [dict(encoder.codecs) for encoder in pools.encoders.in_use]
        every = [codec for codecs in encoders for codec in codecs.values()]
        every += [codec for pool in used for codec in (pool.key_codec, pool.value_codec)]
        self._codecs = list({id(codec): codec for codec in every}.values())
        numbered = [{name: self._number(codec) for name, codec in codecs.items()} for codecs in encoders]
        self.encoders = described(ENCODERS, **dict(zip(ENCODERS, numbered, strict=True))) if numbered else None

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """What is written of each."""
        return [
            described(
                CODEC, name=each.name, keys=each.which is KV.KEYS, rank=each.rank, has_basis=each.basis is not None
            )
            for each in self._codecs
        ]

    def bases(self, prefix: str) -> list[Group]:
        """Return the tensors of low-rank codecs."""
        fitted = [(number, codec.basis) for number, codec in enumerate(self._codecs) if codec.basis is not None]
        return [Group.of({basis_name(prefix, number): basis}) for number, basis in fitted]

    def of_pool(self, pool: PackedPool) -> tuple[int, int]:
        """Return the numbers of a pool's codecs."""
        return self._number(pool.key_codec), self._number(pool.value_codec)

    def _number(self, codec: Codec) -> int:
        return next(number for number, each in enumerate(self._codecs) if each is codec)
