"""What pages may take of fast memory, of the host's memory and of the disk: of a cache, and of each of its layers."""

import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch

from ..common.budget import parse_bytes
from ..config import TIERS, PiKVConfig
from .file_records import PageFileError
from .prefetched_pages import PrefetchThread
from .tier_counters import TierCounters

#: A pool of pages has at least so many in fast memory.
MIN_FRAMES = 2


class TierFull(RuntimeError):
    """No tier has room for pages that must leave a faster one; nothing has changed then."""


class SharingPool(Protocol):
    """What the limits of a layer ask of each pool that shares them."""

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""

    @property
    def frames_made(self) -> int:
        """Pages that the pool's part of fast memory has room for."""

    @property
    def dead_bytes(self) -> int:
        """Bytes on disk that belong to pages that are gone."""

    def tier_bytes(self, tier: str) -> int:
        """Return the bytes taken of a tier."""

    def pages_by_tier(self) -> dict[str, int]:
        """Return the pages in use by the fastest tier that has them."""

    def resident_share(self, more: int = 0) -> float:
        """Return the room in fast memory as a share of the pages in use, and of so many more."""

    def shrink(self, frames: int) -> None:
        """Keep room for only so many pages in fast memory."""

    def free_disk(self, copies: bool) -> None:
        """Shorten files to the pages that are gone, and with `copies` to those that are in fast memory too."""


class Tiers:
    """The tiers of one cache, which its layers and forks share.

    Parameters
    ----------
    config : PiKVConfig
        Its `tiers` and `tier_directory`.
    layers : int
        Paged layers, times the parts of each, which divide the limits evenly.

    Attributes
    ----------
    limits : dict
        Bytes of the whole cache by tier, fastest first, None for no limit.
    counters : TierCounters
        Of all layers and forks.
    prefetch_thread : PrefetchThread
        Reads pages from files ahead of need, for all layers.
    """

    def __init__(self, config: PiKVConfig, layers: int) -> None:
        given = config.tiers or {}
        self.limits: dict[str, int | None] = {}
        for name in (tier for tier in TIERS if tier in given):
            limit = given[name]
            self.limits[name] = parse_bytes(limit, f"the limit of tier {name!r}") if isinstance(limit, str) else limit
        self.layers = layers
        self.counters = TierCounters()
        self._parent = config.tier_directory
        self._directory: Path | None = None
        self._by_layer: dict[tuple[int, int], LayerTiers] = {}
        self.prefetch_thread = PrefetchThread()

    def layer(self, index: int, part: int = 0) -> "LayerTiers":
        """Return what a part of a model layer has of them; forks of a cache share it."""
        if (index, part) not in self._by_layer:
            self._by_layer[index, part] = LayerTiers(self, index)
        return self._by_layer[index, part]

    @property
    def directory(self) -> Path | None:
        """The folder that files are made in, None as long as there are none; it shows none of them."""
        return self._directory

    def new_path(self, name: str) -> Path:
        """Return what to call a file that is to be made, in a folder that is there.

        The folder is made once: should it go, so may have gone the disk that was mounted there.

        Raises
        ------
        PageFileError
            If the folder cannot be made.
        """
        if self._directory is None:
            try:
                folder = Path(self._parent or tempfile.gettempdir())
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                wanted = Path(self._parent or "the folder for temporary files")
                raise PageFileError(wanted, None, "a folder for files of pages", str(error)) from error
            self._directory = folder
        return self._directory / f"{name}.pages"

    def bytes_used(self) -> dict[str, int]:
        """Return the bytes that pages take by tier: memory as allocated, files as long as they are."""
        used = dict.fromkeys(self.limits, 0)
        for layer in self._by_layer.values():
            for tier in layer.names:
                used[tier] += layer.bytes_used(tier)
        return used

    def pages(self) -> dict[str, int]:
        """Return the pages in use by the fastest tier that has them."""
        found = dict.fromkeys(self.limits, 0)
        for layer in self._by_layer.values():
            for pool in layer.pools:
                for tier, count in pool.pages_by_tier().items():
                    found[tier] += count
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return limits, what is used and what was counted as plain values."""
        used = {"limits": dict(self.limits), "bytes": self.bytes_used(), "pages": self.pages()}
        return {**used, **self.counters.to_dict()}


class LayerTiers:
    """One layer's part of the tiers, which its pools share. Made by :meth:`Tiers.layer`."""

    def __init__(self, tiers: Tiers, index: int) -> None:
        self.tiers = tiers
        self.index = index
        self.names = list(tiers.limits)
        self._pools: weakref.WeakSet[SharingPool] = weakref.WeakSet()

    @property
    def counters(self) -> TierCounters:
        """Those of the cache."""
        return self.tiers.counters

    @property
    def fast(self) -> str:
        """The tier that attention reads in place."""
        return self.names[0]

    @property
    def pools(self) -> list[SharingPool]:
        """The pools that exist."""
        return list(self._pools)

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError if the fastest tier is not where attention runs."""
        allowed = ("device", "cpu") if device.type == "cpu" else ("device",)
        if self.fast not in allowed:
            raise ValueError(
                f"layer {self.index} attends on {device}, so tiers need a limit for {' or '.join(map(repr, allowed))}; "
                f"got {', '.join(map(repr, self.names))}"
            )

    def limit(self, tier: str) -> int | None:
        """Return the bytes that this layer may have in a tier, None for no limit."""
        limit = self.tiers.limits[tier]
        return None if limit is None else limit // self.tiers.layers

    def bytes_used(self, tier: str) -> int:
        """Return the bytes that the layer's pages take in a tier."""
        return sum(pool.tier_bytes(tier) for pool in self._pools)

    def room(self, tier: str) -> int:
        """Return how many bytes more the layer may take in a tier."""
        limit = self.limit(tier)
        return sys.maxsize if limit is None else max(0, limit - self.bytes_used(tier))

    def check_limit(self, page_bytes: int) -> None:
        """Raise ValueError if fast memory cannot hold a few pages of this size."""
        limit, needed = self.limit(self.fast), MIN_FRAMES * page_bytes
        if limit is not None and limit < needed:
            raise ValueError(
                f"tier {self.fast!r} may hold {self.tiers.limits[self.fast]} bytes, {limit} in each of "
                f"{self.tiers.layers} layers, but layer {self.index} needs {needed} for {MIN_FRAMES} pages of each kind"
            )

    def add(self, pool: SharingPool) -> None:
        """Let another pool share the limits. Raises ValueError if these are too small for all."""
        self.check_limit(pool.page_bytes + sum(other.page_bytes for other in self._pools))
        self._pools.add(pool)

    def remove(self, pool: SharingPool) -> None:
        """Take back what :meth:`add` did."""
        self._pools.discard(pool)

    def make_room(self, pool: SharingPool, pages: int) -> None:
        """Have the pool that keeps most of its pages in fast memory give some of it to one that keeps fewer."""
        while others := [other for other in self._pools if other is not pool and other.frames_made > MIN_FRAMES]:
            giver = max(others, key=lambda other: other.resident_share())
            starving = pool.frames_made < MIN_FRAMES and self.room(self.fast) < MIN_FRAMES * pool.page_bytes
            if not starving and giver.resident_share() <= 1.5 * pool.resident_share(pages):
                return
            wanted = -(-pages * pool.page_bytes // giver.page_bytes)
            # Some more at a time, since its tensors are copied.
            giver.shrink(max(MIN_FRAMES, giver.frames_made - max(wanted, giver.frames_made // 16, 1)))
            if self.room(self.fast) >= pages * pool.page_bytes:
                return

    def new_path(self, pool: str, shard: int) -> Path:
        """Return what to call a new file; see :meth:`Tiers.new_path`."""
        return self.tiers.new_path(f"layer{self.index}-{pool.replace('/', '_')}-shard{shard}")

    def make_disk_room(self, needed: int) -> None:
        """Make room for bytes on disk, where records of pages that are gone, or also in memory, take it.

        Raises
        ------
        TierFull
            If there is too little.
        """
        if (room := self.room("disk")) >= needed:
            return
        copies = room + sum(pool.dead_bytes for pool in self._pools) < needed
        for pool in self.pools:
            pool.free_disk(copies)
        if (room := self.room("disk")) < needed:
            raise TierFull(
                f"layer {self.index}: tier 'disk' may hold {self.tiers.limits['disk']} bytes, {self.limit('disk')} in "
                f"each of {self.tiers.layers} layers; {needed} more are needed, {room} are left"
            )
