"""A layer of the cache as a file holds it: a description in plain values, and tensors of the pages in use.

Page numbers in a file count the pages in use of a pool, in order of their numbers in memory.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from .layer import PiKVLayer
from .page_book import PageIds
from .saved_pages import describe_pool, pool_prefix
from .schedule import LayerSchedule
from .store import PageStore
from .table import PageTable
from .tensor_file import Group

#: Plain attributes of a layer that make up its state, as :meth:`PiKVLayer.fork` copies them.
STATE = (
    "seen",
    "dropped",
    "_assigned",
    "evicted",
    "vetted",
    "is_initialized",
    "_reference_out",
    "_history_out",
    "_reference_lost",
)
#: Plain attributes of a layer's schedule that make up its state.
SCHEDULE = ("now", "pages_evicted", "tokens_evicted")


def describe_layer(index: int, layer: Any) -> tuple[dict[str, Any], list[Group]]:
    """Return what is written of layer `index`, a :class:`PiKVLayer` or a bounded sliding layer.

    Raises
    ------
    ValueError
        If new tokens of the layer wait for a press, a router or their values.
    """
    if not isinstance(layer, PiKVLayer):
        return _describe_sliding(index, layer)
    if layer.layout.parts > 1:
        raise ValueError(
            f"layer {index} is spread over {layer.layout.parts} devices or processes; only a cache in one place can be "
            "saved in this release"
        )
    layer.settle_unless_held()
    _require_settled(layer)
    description: dict[str, Any] = {
        "kind": "paged",
        "state": {name: getattr(layer, name) for name in STATE},
        "padding": None if layer._padding is None else layer._padding.tolist(),
        "config": layer.config.to_dict(),
        "routed": layer.routed,
        "schedule": None if layer.schedule is None else _describe_schedule(layer.schedule),
        "table": None,
    }
    groups: list[Group] = []
    if layer.table is not None:
        description["table"], groups = _describe_table(f"layers.{index}", layer, layer.table)
    if layer.schedule is not None and layer.schedule.queries is not None:
        groups.append(Group.of({f"layers.{index}.schedule.queries": layer.schedule.queries}))
    return description, groups


def _describe_schedule(schedule: LayerSchedule) -> dict[str, Any]:
    policy: Any = schedule.policy
    return {
        "state": {name: getattr(schedule, name) for name in SCHEDULE},
        "policy": [type(policy).__name__, dataclasses.asdict(policy)],
        "queries": schedule.queries is not None,
    }


def _require_settled(layer: PiKVLayer) -> None:
    where = f"layer {layer.layer_idx}"
    if layer._staged is not None:
        raise ValueError(f"{where}: keys were assigned without values; assign both before saving")
    if layer.pending is not None:
        awaited = "a press" if layer.holds else "the layer's router"
        raise ValueError(
            f"{where}: {layer.pending.tokens} of {layer.seen} tokens wait for {awaited}; save the cache after the "
            "forward pass, and outside of the press's block"
        )


def _describe_sliding(index: int, layer: Any) -> tuple[dict[str, Any], list[Group]]:
    held = bool(layer.is_initialized) and layer.keys.ndim == 4
    description = {
        "kind": "sliding",
        "window": layer.sliding_window,
        "seen": layer.get_seq_length(),
        "held": held,
    }
    parts = {f"layers.{index}.keys": layer.keys, f"layers.{index}.values": layer.values} if held else {}
    return description, [Group.of({name: tensor}) for name, tensor in parts.items()]


# Tables


def _describe_table(prefix: str, layer: PiKVLayer, table: PageTable) -> tuple[dict[str, Any], list[Group]]:
    store, writer = table.pages, table.writer
    used = {name: table.distinct_pages(name) for name in store.pools()}
    used = {name: ids for name, ids in used.items() if len(ids) or not name}
    codecs, groups = _describe_codecs(prefix, store, list(used))
    pools = []
    for name, ids in used.items():
        pool, group = describe_pool(pool_prefix(prefix, name), store.pools()[name], ids)
        pools.append({"name": name, **pool, **codecs["pools"].get(name, {})})
        groups.append(group)
    groups.append(Group.of({f"{prefix}.{name}": part for name, part in _sequences(table, used).items()}))
    if store.queries is not None:
        groups.append(Group.of({f"{prefix}.queries": store.queries}))
    plain = store.plain
    description = {
        "heads": layer.heads,
        "page_heads": plain.keys.shape[0],
        "dims": [plain.keys.shape[-1], plain.values.shape[-1]],
        "dtype": str(layer.dtype).removeprefix("torch."),
        "config": store.config.to_dict(),
        "num_shards": writer.num_shards,
        "recent_window": writer.recent_window,
        "sink_pages": writer.sink_pages,
        "pools": pools,
        "codecs": codecs["codecs"],
        "sealers": codecs["sealers"],
        "queries": store.queries is not None,
        "query_scale": float(store.query_scale),
    }
    return description, groups


def _sequences(table: PageTable, used: dict[str, PageIds]) -> dict[str, torch.Tensor]:
    """Return the rows and their pages.

    Returns
    -------
    dict of str to torch.Tensor
        All int64. `rows` `(R,)`: the sequence of each row. `open` `(S, num_shards)`: open pages, -1 for none. `lengths`
        `(S, 1 + 1 + pools)`: how many pages are in the window, sealed, and in each pool of packed pages. `ids`: these
        pages, one sequence after the other, in that order.
    """
    sequences = list({id(row): row for row in table.rows}.values())
    numbers = {id(sequence): number for number, sequence in enumerate(sequences)}
    renumbered = {name: _renumbering(ids) for name, ids in used.items()}
    ids, lengths = [np.zeros(0, dtype=np.int64)], []
    for sequence in sequences:
        window = np.asarray(sequence.window, dtype=np.int64)
        parts = [renumbered[""][window], renumbered[""][sequence.sealed]]
        parts += [renumbered[name][sequence.pages(name)] for name in used if name]
        ids += parts
        lengths.append([len(part) for part in parts])
    open_pages = np.array([sequence.open for sequence in sequences], dtype=np.int64).reshape(-1, table.num_shards)
    arrays = {
        "rows": np.array([numbers[id(row)] for row in table.rows], dtype=np.int64),
        # The last entry of a renumbering stands for -1.
        "open": renumbered[""][open_pages],
        "lengths": np.array(lengths, dtype=np.int64).reshape(-1, 1 + len(used)),
        "ids": np.concatenate(ids),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _renumbering(used: PageIds) -> PageIds:
    """Return an array that maps the page numbers in memory, and -1, to those in the file."""
    mapping = np.full(int(used.max(initial=-1)) + 2, -1, dtype=np.int64)
    mapping[used] = np.arange(len(used))
    return mapping


def _describe_codecs(prefix: str, store: PageStore, names: list[str]) -> tuple[dict[str, Any], list[Group]]:
    """Describe the codecs, by number: pools and those that will pack the next pages share them."""
    sealers = [dict(sealer.codecs) for sealer in store._sealers or ()]
    pools = {name: store.sealed[name] for name in names if name}
    every = [codec for codecs in sealers for codec in codecs.values()]
    every += [codec for pool in pools.values() for codec in (pool.key_codec, pool.value_codec)]
    distinct = list({id(codec): codec for codec in every}.values())
    number = {id(codec): index for index, codec in enumerate(distinct)}
    bases = {index: codec.basis for index, codec in enumerate(distinct) if codec.basis is not None}
    description = {
        "codecs": [
            {"name": codec.name, "keys": codec.keys, "rank": codec.rank, "basis": codec.basis is not None}
            for codec in distinct
        ],
        "sealers": [{name: number[id(codec)] for name, codec in codecs.items()} for codecs in sealers],
        "pools": {
            name: {"codecs": [number[id(pool.key_codec)], number[id(pool.value_codec)]]} for name, pool in pools.items()
        },
    }
    return description, [Group.of({basis_name(prefix, index): basis}) for index, basis in bases.items()]


def basis_name(prefix: str, codec: int) -> str:
    """Return the name of a codec's basis in the file."""
    return f"{prefix}.codecs.{codec}.basis"
