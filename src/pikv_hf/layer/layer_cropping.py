"""Cutting a layer back to fewer tokens: what a length means, snapshots for exact crops, and cropping the tables."""

import dataclasses

from ..common.transformers_release import CROP_ZERO_REMOVES_NOTHING
from ..page_table.cropping import Crop
from ..page_table.page_table import PageTable
from ..pages.pool_id import PoolId
from .layer_store import LayerStore
from .mask_columns import trimmed


def cropped_length(seen: int, argument: int) -> int:
    """Return how many of `seen` positions `crop(argument)` keeps.

    A negative argument is a number of tokens to remove, which all releases of transformers agree on. A positive one is
    the length to keep, as up to 5.17; zero means what the installed release means by it.
    """
    if argument < 0 or (argument == 0 and CROP_ZERO_REMOVES_NOTHING):
        return max(0, seen + argument)
    return min(seen, argument)


def column_of(store: LayerStore, length: int) -> int:
    """Return the columns that remain of the model's first `length` positions.

    Raises
    ------
    ValueError
        Where K/V were assigned from outside and the length reaches into them: their positions are not known.
    """
    state = store.state
    first_known = state.assigned + state.dropped
    if not length:
        return 0
    if length >= state.positions_seen or not state.dropped or length >= first_known:
        return max(0, length - state.dropped)
    raise ValueError(
        f"layer {store.layer_idx}: cannot crop to {length} positions: of the first {first_known}, "
        f"{state.assigned} tokens were assigned from outside, and which ones is not known"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """The tables of a layer as they were at one length: a crop back to it undoes what was packed after it.

    Attributes
    ----------
    length : int
        Columns of the layer.
    tables : list of PageTable
        Forks of the parts' tables.
    pools : list of set
        For each part, the pools of packed pages that were in use.
    """

    length: int
    tables: list[PageTable]
    pools: list[set[PoolId]]

    @classmethod
    def take(cls, store: LayerStore) -> "Snapshot | None":
        """Return a snapshot of a layer, None where a crop is exact without or a budget would have to pay for it."""
        pages = [table.pools for table in store.tables()]
        # It would hold on to what a budget in bytes has to get rid of.
        is_free = all(each.plain.growth_limit is None for each in pages)
        if not pages[0].encoders.packs or not is_free:
            return None
        pools = [{pool_id for pool_id, pool in each.packed.items() if pool.allocator.refcount.any()} for each in pages]
        return cls(store.state.seen, [table.fork() for table in store.tables()], pools)

    def forget_later_pools(self) -> None:
        """Delete pools that were made after the snapshot, once its tables are those of the layer."""
        for table, pools in zip(self.tables, self.pools, strict=True):
            table.pools.forget_pools(pools)


def reserved_crops(store: LayerStore, length: int) -> list[Crop]:
    """Return crops of the tables of all parts, with room for the pages that they copy."""
    crops = [Crop(table, length) for table in store.tables()]
    for part, cut in zip(store.parts, crops, strict=True):
        part.with_room(store.state.seen, cut.reserve)
    store.note_evictions()
    return crops


def shorten_state(store: LayerStore, length: int) -> None:
    """Let a layer count `length` columns, once its tables have no more."""
    state = store.state
    if store.shard_map is not None:
        store.shard_map.rescale(length / state.seen)
    if state.padding is not None:
        state.padding = trimmed(state.padding[:, :length])
    for part in store.parts:
        if part.scheduler is not None:
            part.scheduler.crop(length)
    state.seen = length
    state.assigned = min(state.assigned, length)
    state.evicted &= length > 0
