"""What a cache has read, evicted and moved."""

import dataclasses
from typing import Any

from rich.console import Group
from rich.table import Table

from ..layer.layer import PiKVLayer
from .fitting_table import as_text, light_table
from .memory_report import format_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made; `str()` or `print()` shows a table.

    Attributes
    ----------
    routed_steps : int
        Decoding steps of a layer in which routing chose pages.
    pages_held, pages_read : int
        In these steps, over KV heads and rows: all pages, and those that were read, with those always read.
    pages_evicted, tokens_evicted : int
        By the scheduler, over all layers.
    tiers : dict or None
        See :meth:`pikv_hf.tiers.tier_limits.Tiers.to_dict`.
    dense_layers : dict
        The paged layers, by index, that now give attention all their K/V, dense, in every step, and why. They save no
        time, and in a step take the memory of a `DynamicCache` beside their own.
    """

    routed_steps: int
    pages_held: int
    pages_read: int
    pages_evicted: int
    tokens_evicted: int
    tiers: dict[str, Any] | None
    dense_layers: dict[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, layers: list[PiKVLayer], tiers: Any) -> "CacheStats":
        """Add up what the layers counted."""
        parts = [part for layer in layers for part in layer.parts]
        counts = [part.page_router.counts for part in parts if part.page_router is not None]
        schedules = [part.scheduler for part in parts if part.scheduler is not None]
        return cls(
            routed_steps=sum(count.steps for count in counts),
            pages_held=sum(count.reachable for count in counts),
            pages_read=sum(int(count.read) for count in counts),
            pages_evicted=sum(scheduler.pages_evicted for scheduler in schedules),
            tokens_evicted=sum(scheduler.tokens_evicted for scheduler in schedules),
            tiers=None if tiers is None else tiers.to_dict(),
            dense_layers={
                layer.layer_idx: reason for layer in layers if (reason := layer.reference.dense_reason()) is not None
            },
        )

    @property
    def read_share(self) -> float | None:
        """The share of pages that routed steps read, None without any."""
        return self.pages_read / self.pages_held if self.pages_held else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {**dataclasses.asdict(self), "read_share": self.read_share}

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Group:
        table = light_table("Routing and budget", show_header=False)
        share = "-" if self.read_share is None else f"{self.read_share:.1%}"
        table.add_row("pages read, of those held", f"{self.pages_read:,} of {self.pages_held:,} ({share})")
        table.add_row("evicted", f"{self.pages_evicted:,} pages, {self.tokens_evicted:,} tokens")
        dense = [_dense_table(self.dense_layers)] if self.dense_layers else []
        return Group(table, *dense, *([] if self.tiers is None else tier_tables(self.tiers)))


def _dense_table(layers: dict[int, str]) -> Table:
    """Return a table of the layers that are read densely, those with the same reason in one row."""
    table = light_table("Layers that are read densely")
    table.add_column("layers")
    table.add_column("why")
    for reason in dict.fromkeys(layers.values()):
        table.add_row(", ".join(str(index) for index, why in layers.items() if why == reason), reason)
    return table


def tier_tables(tiers: dict[str, Any]) -> list[Table]:
    """Return tables of what tiers hold and what moved between them."""
    tiers_table = light_table("Tiers", "tier", "limit", "bytes", "pages")
    for name, limit in tiers["limits"].items():
        at_most = "-" if limit is None else format_bytes(limit)
        tiers_table.add_row(name, at_most, format_bytes(tiers["bytes"][name]), f"{tiers['pages'][name]:,}")
    moved = light_table("Pages that attention read", show_header=False)
    rate = "-" if tiers["hit_rate"] is None else f"{tiers['hit_rate']:.1%}"
    moved.add_row("in fast memory", f"{tiers['hits']:,} of {tiers['hits'] + tiers['misses']:,} ({rate})")
    moved.add_row("promoted, demoted", f"{tiers['promoted']:,}, {tiers['demoted']:,}")
    for path, amount in tiers["bytes_moved"].items():
        moved.add_row(f"moved {path}", format_bytes(amount))
    moved.add_row("waited for pages", f"{tiers['stall_seconds']:.3f} s")
    ahead = tiers["prefetches"]
    moved.add_row("read ahead", f"{ahead['issued']:,}: {ahead['used']:,} used, {ahead['wasted']:,} not")
    return [tiers_table, moved]
