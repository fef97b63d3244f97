"""What one part of a layer stores, as a file holds it: a description in plain values, and tensors of the pages in use.

Page numbers in a file count the pages in use of a pool, in order of their numbers in memory.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from ..common.kv import KV
from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from ..scheduling.page_scheduler import PageScheduler
from .pool_records import describe_pool, name_in_file, pool_prefix
from .tensor_file import Group

#: Plain attributes of a part's schedule that make up its state.
SCHEDULE = ("now", "pages_evicted", "tokens_evicted")


def describe_part(prefix: str, layer: PiKVLayer, part: LayerPart) -> tuple[dict[str, Any], list[Group]]:
    """Return what is written of a part, with names of tensors that begin with `prefix`."""
    description: dict[str, Any] = {
        "schedule": None if part.scheduler is None else _describe_schedule(part.scheduler),
        "table": None,
    }
    groups: list[Group] = []
    if part.table is not None:
        description["table"], groups = _describe_table(prefix, layer, part.table)
    if part.scheduler is not None and part.scheduler.queries is not None:
        groups.append(Group.of({f"{prefix}.schedule.queries": part.scheduler.queries}))
    return description, groups


def _describe_schedule(schedule: PageScheduler) -> dict[str, Any]:
    policy: Any = schedule.policy
    return {
        "state": {name: getattr(schedule, name) for name in SCHEDULE},
        "policy": [type(policy).__name__, dataclasses.asdict(policy)],
        "queries": schedule.queries is not None,
    }


def _describe_table(prefix: str, layer: PiKVLayer, table: PageTable) -> tuple[dict[str, Any], list[Group]]:
    store, writer = table.pools, table.writer
    used = {name: table.distinct_pages(name) for name in store.by_id()}
    used = {name: ids for name, ids in used.items() if len(ids) or name == PLAIN}
    codecs, groups = _describe_codecs(prefix, store, list(used))
    pools = []
    for name, ids in used.items():
        pool, group = describe_pool(pool_prefix(prefix, name), store.by_id()[name], ids)
        pools.append({"name": name_in_file(name), **pool, **codecs["pools"].get(name, {})})
        groups.append(group)
    groups.append(Group.of({f"{prefix}.{name}": part for name, part in _sequences(table, used).items()}))
    if store.encoders.queries is not None:
        groups.append(Group.of({f"{prefix}.queries": store.encoders.queries}))
    plain = store.plain
    description = {
        "heads": layer.heads,
        "page_heads": plain.keys.shape[0],
        "dims": [plain.keys.shape[-1], plain.values.shape[-1]],
        "dtype": str(layer.store.dtype).removeprefix("torch."),
        "config": store.config.to_dict(),
        "num_shards": writer.num_shards,
        "recent_window": writer.recent_window,
        "sink_pages": writer.sink_pages,
        "pools": pools,
        "codecs": codecs["codecs"],
        "sealers": codecs["sealers"],
        "queries": store.encoders.queries is not None,
        "query_scale": float(store.encoders.query_scale),
    }
    return description, groups


def _sequences(table: PageTable, used: dict[PoolId, PageIds]) -> dict[str, torch.Tensor]:
    """Return the rows and their pages.

    Returns
    -------
    dict of str to torch.Tensor
        All int64. `rows` `(R,)`: the sequence of each row. `open` `(S, num_shards)`: open pages, -1 for none. `lengths`
        `(S, 1 + 1 + pools)`: how many pages are in the window, sealed, and in each pool of packed pages. `ids`: these
        pages, one sequence after the other, in that order.
    """
    sequences = table.sequences()
    numbers = {id(sequence): number for number, sequence in enumerate(sequences)}
    renumbered = {name: _renumbering(ids) for name, ids in used.items()}
    ids, lengths = [np.zeros(0, dtype=np.int64)], []
    for sequence in sequences:
        window = np.asarray(sequence.window, dtype=np.int64)
        parts = [renumbered[PLAIN][window], renumbered[PLAIN][sequence.full]]
        parts += [renumbered[name][sequence.pages(name)] for name in used if name != PLAIN]
        ids += parts
        lengths.append([len(part) for part in parts])
    open_pages = np.array([sequence.open for sequence in sequences], dtype=np.int64).reshape(-1, table.num_shards)
    arrays = {
        "rows": np.array([numbers[id(row)] for row in table.rows], dtype=np.int64),
        # The last entry of a renumbering stands for -1.
        "open": renumbered[PLAIN][open_pages],
        "lengths": np.array(lengths, dtype=np.int64).reshape(-1, 1 + len(used)),
        "ids": np.concatenate(ids),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _renumbering(used: PageIds) -> PageIds:
    """Return an array that maps the page numbers in memory, and -1, to those in the file."""
    mapping = np.full(int(used.max(initial=-1)) + 2, -1, dtype=np.int64)
    mapping[used] = np.arange(len(used))
    return mapping


def _describe_codecs(prefix: str, store: LayerPools, names: list[PoolId]) -> tuple[dict[str, Any], list[Group]]:
    """Describe the codecs, by number: pools and those that will pack the next pages share them."""
    encoders = [dict(encoder.codecs) for encoder in store.encoders.in_use]
    pools = {name: store.packed[name] for name in names if name != PLAIN}
    every = [codec for codecs in encoders for codec in codecs.values()]
    every += [codec for pool in pools.values() for codec in (pool.key_codec, pool.value_codec)]
    distinct = list({id(codec): codec for codec in every}.values())
    number = {id(codec): index for index, codec in enumerate(distinct)}
    bases = {index: codec.basis for index, codec in enumerate(distinct) if codec.basis is not None}
    description = {
        "codecs": [
            {"name": codec.name, "keys": codec.which is KV.KEYS, "rank": codec.rank, "basis": codec.basis is not None}
            for codec in distinct
        ],
        "sealers": [{name: number[id(codec)] for name, codec in codecs.items()} for codecs in encoders],
        "pools": {
            name: {"codecs": [number[id(pool.key_codec)], number[id(pool.value_codec)]]} for name, pool in pools.items()
        },
    }
    return description, [Group.of({basis_name(prefix, index): basis}) for index, basis in bases.items()]


def basis_name(prefix: str, codec: int) -> str:
    """Return the name of a codec's basis in the file."""
    return f"{prefix}.codecs.{codec}.basis"
