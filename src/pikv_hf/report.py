"""What a cache costs: bytes counted from live storages."""

import dataclasses
import io
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def live_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind tensors: a view costs what it keeps alive."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def format_bytes(count: float) -> str:
    """Return a byte count in the largest fitting binary unit, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes and tokens of one layer.

    Attributes
    ----------
    layer : int
        The model layer.
    kind : str
        `"paged"` or `"sliding"` (transformers' bounded layer).
    device : str
        Where its tensors are.
    keys, values, metadata, total : int
        Live bytes. Metadata is positions, expert ids, page tables and reference counts.
    window, free, pending : int
        Bytes of K/V in the sink and recent pages, in unused pages, and waiting for the layer's router.
    shards : tuple of int
        Bytes of K/V in the pages of each shard.
    shard_tokens : tuple of int
        Tokens in each shard, shared pages counted once.
    tokens_seen, tokens_stored : int
        Positions per row, padding included, and tokens held, shared ones counted once.
    """

    layer: int
    kind: str
    device: str
    keys: int
    values: int
    metadata: int
    total: int
    window: int
    free: int
    pending: int
    shards: tuple[int, ...]
    shard_tokens: tuple[int, ...]
    tokens_seen: int
    tokens_stored: int


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes and tokens of a cache; `str()` or `print()` shows a table.

    Attributes
    ----------
    total : int
        Live bytes, equal to `cache.nbytes`.
    layers : tuple of LayerMemory
        By layer.
    """

    total: int
    layers: tuple[LayerMemory, ...]

    @property
    def keys(self) -> int:
        """Bytes of keys."""
        return sum(layer.keys for layer in self.layers)

    @property
    def values(self) -> int:
        """Bytes of values."""
        return sum(layer.values for layer in self.layers)

    @property
    def metadata(self) -> int:
        """Bytes of positions, expert ids, page tables and reference counts."""
        return sum(layer.metadata for layer in self.layers)

    @property
    def window(self) -> int:
        """Bytes of K/V in sink and recent pages."""
        return sum(layer.window for layer in self.layers)

    @property
    def per_layer(self) -> dict[int, int]:
        """Bytes by layer index."""
        return {layer.layer: layer.total for layer in self.layers}

    @property
    def per_shard(self) -> tuple[int, ...]:
        """Bytes of K/V in the pages of each shard, summed over layers."""
        width = max((len(layer.shards) for layer in self.layers), default=0)
        return tuple(sum(layer.shards[s] for layer in self.layers if s < len(layer.shards)) for s in range(width))

    @property
    def per_device(self) -> dict[str, int]:
        """Bytes by device."""
        devices: dict[str, int] = {}
        for layer in self.layers:
            devices[layer.device] = devices.get(layer.device, 0) + layer.total
        return devices

    @property
    def tokens_seen(self) -> int:
        """Positions seen by each row, padding included."""
        return max((layer.tokens_seen for layer in self.layers), default=0)

    @property
    def tokens_stored(self) -> int:
        """Tokens held, summed over layers; shared ones count once."""
        return sum(layer.tokens_stored for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {
            "total": self.total,
            "keys": self.keys,
            "values": self.values,
            "metadata": self.metadata,
            "window": self.window,
            "per_shard": list(self.per_shard),
            "per_device": self.per_device,
            "tokens_seen": self.tokens_seen,
            "tokens_stored": self.tokens_stored,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(self.__rich__())
        return console.export_text().rstrip()

    def __rich__(self) -> Table:
        table = Table(title=f"PiKVCache: {format_bytes(self.total)}, {self.tokens_seen} tokens seen")
        for name in ("layer", "kind", "device", "K", "V", "metadata", "window", "shards", "free", "total", "tokens"):
            table.add_column(name, justify="left" if name in ("kind", "device") else "right")
        for row in self.layers:
            amounts = (row.keys, row.values, row.metadata, row.window, sum(row.shards), row.free, row.total)
            cells = [format_bytes(amount) for amount in amounts]
            table.add_row(str(row.layer), row.kind, row.device, *cells, str(row.tokens_stored))
        return table
