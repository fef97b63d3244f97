"""Checking that what a file says of the pages of a part makes sense, before anything is built of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..page_table.sequence_pages import SequencePages
from ..pages.pool_id import PLAIN, PoolId
from .pool_records import most_pages
from .table_reader import TableReader
from .tensor_file import require

#: Keys of a table that are the same in all parts of a layer.
SAME_IN_ALL_PARTS = (
    *("heads", "page_heads", "key_dim", "value_dim", "dtype"),
    *("config", "num_shards", "recent_window", "sink_pages"),
)


def check_table(table: TableReader) -> None:
    """Raise unless rows, pages and counts fit one another. The specs have been checked."""
    rows, sequences = table.rows, table.sequences()
    numbers = list(dict.fromkeys(rows.tolist()))
    require(numbers == list(range(len(sequences))), f"rows are of sequences {numbers} of {len(sequences)}")
    require(table.lanes > 0 and len(rows) % table.lanes == 0, f"{len(rows)} rows of {table.lanes} lanes each")
    for pool in table.pools:
        _check_pool(table, pool, sequences)
    for window, outside in zip(table.positions(True), table.positions(False), strict=True):
        require(are_distinct([window, outside]), "a row has a position twice")


def check_beside(table: TableReader, first: TableReader) -> None:
    """Raise unless this part has the rows, and the window, of the first part of its layer. Both have been checked.

    All parts have the tokens of the window, and read only the first part's.
    """
    for name in SAME_IN_ALL_PARTS:
        here, there = table.description[name], first.description[name]
        require(here == there, f"its {name} is {here}, that of the first part {there}")
    rows, others = table.rows.tolist(), first.rows.tolist()
    require(rows == others, f"its rows are of the sequences {rows}, those of the first part of {others}")
    for number, (here, there) in enumerate(zip(table.windows(), first.windows(), strict=True)):
        alike = all(_are_same(one, other) for one, other in zip(here, there, strict=True))
        require(alike, f"the window of sequence {number} is not that of the first part")


def _check_pool(table: TableReader, pool: dict[str, Any], sequences: list[SequencePages]) -> None:
    """Check the pages of a pool."""
    pool_id, size, shards = PoolId.parse(pool["name"]), table.config.page_size, table.description["num_shards"]
    name, tensors = pool["name"], table.tensors_of(pool_id)
    positions, count, shard = (tensors[part].numpy() for part in ("positions", "count", "shard"))
    filled = positions >= 0
    first = np.arange(size) < count[:, None]
    require(bool((filled == first).all() and (count <= size).all()), f"counts of pool {name!r} are wrong")
    require(bool((positions < table.seen).all()), f"positions in pool {name!r} reach beyond {table.seen}")
    require(bool(((shard >= -1) & (shard < shards)).all()), f"shards in pool {name!r} are not below {shards}")
    new, most = tensors["numbers"].numpy(), pool["capacity"]
    fit = len(new) <= most <= most_pages(len(new)) and ((new >= 0) & (new < most)).all()
    require(bool(fit and (np.diff(new) > 0).all()), f"pages of pool {name!r} have the numbers {new} of {most}")
    in_use = np.zeros(len(count), dtype=np.bool_)
    for pages in (sequence.pages(pool_id) for sequence in sequences):
        require(not len(pages) or 0 <= pages.min() <= pages.max() < len(count), f"page numbers in pool {name!r}")
        in_use[pages] = True
    require(bool(in_use.all()), f"pool {name!r} has pages that no row holds")
    if pool_id == PLAIN:
        _check_fill(table, sequences, count, shard)


def _check_fill(table: TableReader, sequences: list[SequencePages], count: np.ndarray, shard: np.ndarray) -> None:
    size, left = table.config.page_size, table.tensors_of(PLAIN)["incompressible"].numpy()
    for each in sequences:
        window, is_open = np.array(each.window[:-1], dtype=np.int64), each.open >= 0
        partial = count[each.open[is_open]]
        # Cut by a crop where parts have given pages to each other; see :mod:`pikv_hf.page_table.cropping`.
        may_be_cut = left[each.full] & (count[each.full] > 0) & (not table.is_alone)
        is_full = np.append(count[window] == size, (count[each.full] == size) | may_be_cut)
        require(bool(is_full.all()), "a page that should be full is not")
        require(bool(((partial > 0) & (partial < size)).all()), "an open page is empty or full")
        shards = shard[each.open[is_open]]
        require(bool((shards == np.flatnonzero(is_open)).all()), f"open pages of the shards {shards.tolist()}")


def are_distinct(positions: Sequence[np.ndarray]) -> bool:
    """Return whether no position is there twice."""
    return int(np.bincount(np.concatenate(positions), minlength=1).max()) <= 1


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes, whatever numbers these are."""
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
