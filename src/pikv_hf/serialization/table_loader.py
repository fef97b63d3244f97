"""Building the page table of a part of a layer from what a file says."""

import torch

from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import SequenceWriter
from .pool_records import fill_pool, restore_bounds_and_usage
from .table_reader import TableReader


def build_table(saved: TableReader, layer: PiKVLayer, part: LayerPart, device: torch.device) -> PageTable:
    """Return the table, for a part of a layer that knows its options, expert loads and shards already."""
    pools = saved.empty_pools(device, part.tiers, rotary_values=part.latent and saved.heads == 1)
    pool_ids = saved.pool_ids()
    pages = zip(pool_ids, saved.pools, strict=True)
    restored = [(pools.by_id()[each], described, saved.tensors_of(each)) for each, described in pages]
    for each in restored:
        fill_pool(*each)
    if saved.description["has_queries"]:
        pools.encoders.remember_queries(
            saved.section["queries"].to(device, copy=True), saved.description["query_scale"]
        )
    sequences = saved.sequences({each: saved.tensors_of(each)["numbers"].numpy() for each in pool_ids})
    for sequence in sequences:
        pools.incref(sequence)
    sinks = saved.description["sink_pages"] * pools.plain.page_size
    shards, window = saved.description["num_shards"], saved.description["recent_window"]
    writer = SequenceWriter(pools, shards, window, sinks, layer.store.shard_of())
    part.assign_shards(writer, layer.store.shard_map)
    table = PageTable.from_rows(writer, [sequences[number] for number in saved.rows.tolist()])
    if part.page_router is not None:
        part.page_router.policy.prepare(pools)
    if part.scheduler is not None:
        part.scheduler.prepare(table)
    # Older files have bounds of latents without their rotary keys: those of both are found again where they are read.
    outdated = saved.rotary_values is False and pools.plain.rotary_values
    for pool, described, section in restored:
        restore_bounds_and_usage(pool, {**described, "has_bounds": False} if outdated else described, section)
    return table
