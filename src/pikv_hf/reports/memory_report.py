"""What a cache costs: bytes counted from live storages."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .fitting_table import as_text, light_table


def format_bytes(count: float) -> str:
    """Return a byte count in the largest fitting binary unit, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclasses.dataclass(frozen=True, slots=True)
class CodecMemory:
    """What one codec holds, and what it did to it.

    Attributes
    ----------
    codec : str
        `"int4"`, or `"int4/int2"` where keys and values differ; `"none"` is window, open pages and what no codec took.
    pages, tokens : int
        Pages in use, shared ones once, and the tokens in them.
    keys, values : int
        Bytes of the K/V of these pages, scales included.
    squares : tuple of float
        Sums over all tokens and heads of the squares of keys, of their errors, of values, of their errors.
    logit_squares, judged : float, int
        Mean square errors of the attention logits of recent queries, summed over the pages where such queries were
        known, and the number of these pages.
    """

    codec: str
    pages: int
    tokens: int
    keys: int
    values: int
    squares: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    logit_squares: float = 0.0
    judged: int = 0

    @property
    def key_error(self) -> float:
        """Relative root mean square error of the keys."""
        return (self.squares[1] / self.squares[0]) ** 0.5 if self.squares[0] else 0.0

    @property
    def value_error(self) -> float:
        """Relative root mean square error of the values."""
        return (self.squares[3] / self.squares[2]) ** 0.5 if self.squares[2] else 0.0

    @property
    def logit_error(self) -> float | None:
        """Root mean square error of the attention logits of recent queries; None if none were known."""
        return (self.logit_squares / self.judged) ** 0.5 if self.judged else None

    def __add__(self, other: "CodecMemory") -> "CodecMemory":
        return CodecMemory(
            self.codec,
            self.pages + other.pages,
            self.tokens + other.tokens,
            self.keys + other.keys,
            self.values + other.values,
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            self.logit_squares + other.logit_squares,
            self.judged + other.judged,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        figures = {name: getattr(self, name) for name in ("codec", "pages", "tokens", "keys", "values")}
        errors = {name: getattr(self, name) for name in ("key_error", "value_error", "logit_error")}
        return {**figures, **errors}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes and tokens of one layer, or of one of its parts where it has several.

    Attributes
    ----------
    layer : int
        The model layer.
    kind : str
        `"paged"`, or transformers' own: `"sliding"` (bounded), `"state"` (linear attention, convolution), `"none"`.
    device : str
        Where its tensors are.
    keys, values, metadata, total : int
        Live bytes. Metadata is positions, expert ids, page tables, reference counts, errors and observed queries.
    state : int
        Bytes of convolution and recurrent states.
    window, free, pending : int
        Bytes of K/V in the sink and recent pages, in unused pages, and waiting for the layer's router.
    shards : tuple of int
        Bytes of K/V in the pages of each shard.
    shard_tokens : tuple of int
        Tokens in each shard, shared pages counted once.
    tokens_seen, tokens_stored : int
        Positions per row, padding included, and tokens held, shared ones counted once.
    codecs : tuple of CodecMemory
        What each codec holds.
    """

    layer: int
    kind: str
    device: str
    keys: int = 0
    values: int = 0
    metadata: int = 0
    state: int = 0
    total: int = 0
    window: int = 0
    free: int = 0
    pending: int = 0
    shards: tuple[int, ...] = ()
    shard_tokens: tuple[int, ...] = ()
    tokens_seen: int = 0
    tokens_stored: int = 0
    codecs: tuple[CodecMemory, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes and tokens of a cache; `str()` or `print()` shows a table.

    Attributes
    ----------
    total : int
        Live bytes, equal to `cache.nbytes`.
    layers : tuple of LayerMemory
        By layer, and within it by device.
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
    def state(self) -> int:
        """Bytes of convolution and recurrent states."""
        return sum(layer.state for layer in self.layers)

    @property
    def window(self) -> int:
        """Bytes of K/V in sink and recent pages."""
        return sum(layer.window for layer in self.layers)

    @property
    def per_layer(self) -> dict[int, int]:
        """Bytes by layer index."""
        layers: dict[int, int] = {}
        for layer in self.layers:
            layers[layer.layer] = layers.get(layer.layer, 0) + layer.total
        return layers

    @property
    def per_shard(self) -> tuple[int, ...]:
        """Bytes of K/V in the pages of each shard, summed over layers."""
        width = max((len(layer.shards) for layer in self.layers), default=0)
        return tuple(sum(layer.shards[s] for layer in self.layers if s < len(layer.shards)) for s in range(width))

    @property
    def per_codec(self) -> dict[str, CodecMemory]:
        """What each codec holds, summed over layers."""
        codecs: dict[str, CodecMemory] = {}
        for each in (codec for layer in self.layers for codec in layer.codecs):
            codecs[each.codec] = codecs[each.codec] + each if each.codec in codecs else each
        return codecs

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
            "state": self.state,
            "window": self.window,
            "per_shard": list(self.per_shard),
            "per_device": self.per_device,
            "tokens_seen": self.tokens_seen,
            "tokens_stored": self.tokens_stored,
            "per_codec": [codec.to_dict() for codec in self.per_codec.values()],
            "layers": [
                {**dataclasses.asdict(layer), "codecs": [codec.to_dict() for codec in layer.codecs]}
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Group:
        packed = len(self.per_codec) > 1
        return Group(self._layer_table(), self._sums(), *([self._codec_table()] if packed else []))

    def _layer_table(self) -> Table:
        """Return a table of the layers; what is the same for all of them is in its title."""
        devices, states = list(self.per_device), bool(self.state)
        # Of a cache without tokens nothing is anywhere.
        device = [] if len(devices) > 1 else [f" on {name}" for name in devices if name != "-"]
        title = f"PiKVCache: {format_bytes(self.total)}{''.join(device)}, {self.tokens_seen:,} tokens seen"
        shown = [True, len(devices) > 1, True, True, True, True, True, states, True]
        names = ("layer", "device", "tokens", "window", "shards", "free", "metadata", "state", "total")
        table = light_table(title, *_picked(names, shown))
        for row in self.layers:
            name = f"{row.layer}" if row.kind == "paged" else f"{row.layer} {row.kind}"
            sizes = (row.window, sum(row.shards), row.free, row.metadata, row.state, row.total)
            cells = (name, row.device, f"{row.tokens_stored:,}", *map(format_bytes, sizes))
            table.add_row(*_picked(cells, shown))
        return table

    def _sums(self) -> Text:
        sizes = {"K": self.keys, "V": self.values, "metadata": self.metadata, "states": self.state}
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size or name != "states")
        return Text(f"Bytes in memory: {parts}.")

    def _codec_table(self) -> Table:
        columns = "codec", "pages", "tokens", "K", "V", "K error", "V error", "logits"
        table = light_table("\nBy codec: bytes in use, relative errors, error of recent queries' logits", *columns)
        for each in self.per_codec.values():
            errors = [f"{error:.2%}" for error in (each.key_error, each.value_error)]
            logits = "-" if each.logit_error is None else f"{each.logit_error:.3f}"
            cells = [f"{each.pages:,}", f"{each.tokens:,}", format_bytes(each.keys), format_bytes(each.values)]
            table.add_row(each.codec, *cells, *errors, logits)
        return table


def _picked(cells: Sequence[str], shown: Sequence[bool]) -> list[str]:
    return list(itertools.compress(cells, shown))
