"""What presses do to a layer: tokens are kept, in the widths chosen for them, or evicted, each KV head's its own."""

from typing import Any

import torch

from ..allocation.earlier_pages import StoredPages
from ..page_table.compaction import bits_of
from ..page_table.page_table import PageTable
from ..pages.pool_id import UNCODED
from .layer_store import LayerStore
from .table_rebuild import TableRebuild, checked_widths, leaders_of, with_exact_ends


def check_evicts(store: LayerStore, is_attached: bool) -> None:
    """Raise `ValueError` unless a layer has tokens, and attention that can pass over evicted ones."""
    if store.indexer_dim:
        raise ValueError(
            f"layer {store.layer_idx}: an indexer of the model's own chooses among all tokens, and would choose what "
            "was evicted, too; codecs, tiers and devices are what such a layer can have"
        )
    if store.table is None:
        raise ValueError(f"layer {store.layer_idx} holds no tokens, of which some could be kept")
    if not is_attached:
        raise ValueError(
            f"layer {store.layer_idx}: only PiKV's attention can pass over evicted tokens; make the cache with "
            "PiKVCache.for_model(model)"
        )


def check_kept(store: LayerStore, heads: int, kept: torch.Tensor) -> None:
    """Refuse what is to be kept of so many heads as :func:`~pikv_hf.layer.table_rebuild.checked_widths` does."""
    checked_widths(kept, (store.batch, heads, store.state.seen), f"layer {store.layer_idx}")


def keep_tokens(store: LayerStore, kept: torch.Tensor) -> None:
    """Evict tokens and keep the others in the widths given; see :meth:`PiKVLayer.keep`."""
    state = store.state
    widths = checked_widths(kept, (store.batch, store.heads, state.seen), f"layer {store.layer_idx}")
    widths = with_exact_ends(widths.to(store.device), store.config)
    with store.transaction():
        tables = _kept_tables(store, widths)
        if store.shard_map is not None and widths.numel():
            store.shard_map.rescale(float((widths > 0).float().mean()))
            store.shard_map.add_evenly(float((widths[:, :, store.stored :] > 0).sum()) / store.heads)
        store.drop_pending()
        store.replace_tables(tables)
        state.evicted |= bool((widths == 0).any())
        store.note_evictions()


def _kept_tables(store: LayerStore, widths: torch.Tensor) -> list[PageTable]:
    """Return a table of each part for what is kept, `(B, H, T)` widths; the old ones stay as they are."""
    assert store.table is not None
    split = store.lanes > 1 or not torch.equal(widths, widths[:, :1].expand_as(widths))
    leaders = leaders_of(store.table, store.pending, widths)
    rebuild = TableRebuild(store.config, store.shard_of(), store.shard_map, leaders, split)
    tables = []
    for part, widths_here in zip(store.parts, _widths_by_part(store, widths), strict=True):
        table = part.kept_table(store.pending, widths_here, rebuild)
        part.fit(table, store.heads // table.plain.keys.shape[0], store.state.seen)
        tables.append(table)
    return tables


def _widths_by_part(store: LayerStore, widths: torch.Tensor) -> list[torch.Tensor]:
    """Return the widths of what each part keeps: of what is stored what it has, of what is pending its own."""
    if store.layout.parts == 1:
        return [widths]
    stored, divided = store.stored, []
    for part, own in zip(store.parts, store.own_tokens(widths[:, :, stored:] > 0), strict=True):
        assert part.table is not None
        assert own is not None
        here = part.table.view.stored_mask(stored).to(store.device).view(store.batch, store.lanes, stored)
        divided.append(widths * torch.cat([here.expand(-1, store.heads, -1), own], dim=2))
    return divided


def kept_by_marks(store: LayerStore, marks: Any) -> torch.Tensor:
    """Return `(B, H, T)` bool, what is left of a layer without the tokens that kvpress's presses have marked.

    Parameters
    ----------
    store : LayerStore
        Of a layer that has tokens.
    marks : tuple of sequence
        Rows, KV heads and columns, as kvpress's `module.masked_key_indices` has them.

    Raises
    ------
    ValueError
        If rows are padded, or a column is marked that there is none of.
    """
    where, seen = f"layer {store.layer_idx}", store.state.seen
    if store.is_padded:
        raise ValueError(
            f"{where}: a press has marked tokens of rows that are padded, and has taken padding for tokens. Wrap it: "
            "pikv_hf.presses.RowwisePress(press)"
        )
    kept = torch.ones((store.batch, store.heads, seen), dtype=torch.bool, device=store.device)
    rows, heads, columns = (torch.as_tensor(part, device=store.device) for part in marks)
    if columns.numel() and int(columns.max()) >= seen:
        raise ValueError(f"{where}: a press marked token {int(columns.max())}, but the layer has {seen}")
    kept[rows, heads, columns] = False
    return kept


def packed_pages(store: LayerStore) -> StoredPages:
    """Return the pages that a codec has packed: they stay as they are, or go as a whole.

    Pages that several sequences share come once for each. What is stored as the model made it is none of them.
    """
    found = [_packed_pages(store, table) for table in store.tables()]
    if not found:
        return StoredPages.none(getattr(store, "device", torch.device("cpu")))
    fields = ("rows", "columns", "nbytes", "widths")
    return StoredPages(*(torch.cat([getattr(pages, name) for pages in found]) for name in fields))


def _packed_pages(store: LayerStore, table: PageTable) -> StoredPages:
    """Return the pages of one part."""
    rows: list[torch.Tensor] = []
    columns, sizes, bits = list(rows), list(rows), list(rows)
    heads, lanes, device, size = store.heads, store.lanes, store.device, table.plain.page_size
    for pool_id, pool in table.pools.packed.items():
        if pool_id == UNCODED:
            continue
        # With its positions, its entry in the table, and what the host knows of it.
        each = pool.page_bytes + 4 * size + 8 + pool.host_bytes // max(1, pool.capacity)
        for row, sequence in enumerate(table.rows):
            pages = sequence.pages(pool_id)
            positions = pool.positions[pool.index(pages)].long().to(device)
            by_head = positions.new_full((len(pages), heads, size), -1)
            head = slice(None) if lanes == 1 else slice(row % lanes, row % lanes + 1)
            by_head[:, head] = positions[:, None]
            columns.append(by_head)
            for known, value in ((rows, row // lanes), (sizes, each), (bits, bits_of(pool_id) or 16)):
                known.append(torch.full((len(pages),), value, device=device))
    if not rows:
        return StoredPages.none(device)
    return StoredPages(*(torch.cat(known) for known in (rows, columns, sizes, bits)))
