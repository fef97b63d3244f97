"""What a model, a context and a batch need on so many devices, and how they are best used."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pikv_hf.config import PiKVConfig

from .attention_work import layer_work
from .cache_contents import CacheContents
from .cache_memory import CacheBytes, packed_page_bytes, part_bytes, stored_tokens
from .capacity import ShardCapacity, shard_capacity
from .hardware import Device
from .model_shape import ModelShape
from .page_counts import page_counts, shard_loads
from .step_time import IMBALANCE, Mode, StepTime, crossover, sent_bytes, step_time

#: Of a device's memory, what activations, kernels' buffers, the runtime and fragmentation are left.
RESERVE = 0.1

#: Tokens decoded by the time that memory is counted, so that pools have grown.
DECODED = 128

# Contexts and batches are searched up to here.
_MOST_TOKENS, _MOST_ROWS = 1 << 24, 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What is to be run, and on what.

    Attributes
    ----------
    model : ModelShape
        The model.
    tokens, batch : int
        Context of each row, and rows.
    device : Device
        Of a kind.
    devices : int
        How many there are at most.
    options : PiKVConfig
        How K/V are stored.
    mode : {"processes", "devices"}, optional
        See :func:`pikv_hf.planning.step_time.step_time`; by default the first that fits.
    loads : tuple of float, optional
        Shares of the tokens by shard; equal by default.
    z : float
        Margin of the capacity of shards.

    Raises
    ------
    ValueError
        For sizes that are not positive.
    """

    model: ModelShape
    tokens: int
    batch: int
    device: Device
    devices: int = 1
    options: PiKVConfig = dataclasses.field(default_factory=PiKVConfig)
    mode: Mode | None = None
    loads: tuple[float, ...] | None = None
    z: float = 3.0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def contents(self) -> CacheContents:
        """What a cache holds at the end of the context."""
        return CacheContents(self.tokens, self.batch, self.options, loads=self.loads)

    @property
    def usable(self) -> int:
        """Bytes of a device that weights and K/V may take."""
        return int(self.device.memory * (1 - RESERVE))


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The workload on so many devices.

    Attributes
    ----------
    devices : int
        G.
    mode : {"processes", "devices"}
        How they are used.
    weight_bytes : int
        On each device.
    kv : CacheBytes
        On the fullest device.
    usable : int
        Bytes that both may take.
    max_context, max_batch : int
        Tokens per row that fit with this batch, and rows that fit with this context; 0 if none does.
    step : StepTime
        A decoding step of all rows.
    tokens_per_second : float
        Of all rows together.
    sent_bytes : float
        That a device sends on average, per token.
    read_bytes : float
        That the fullest device reads from memory, per token: weights and K/V.
    """

    devices: int
    mode: Mode
    weight_bytes: int
    kv: CacheBytes
    usable: int
    max_context: int
    max_batch: int
    step: StepTime
    tokens_per_second: float
    sent_bytes: float
    read_bytes: float

    @property
    def needed(self) -> int:
        """Bytes of weights and K/V on the fullest device."""
        return int(self.weight_bytes + self.kv.total)

    @property
    def fits(self) -> bool:
        """Whether they do."""
        return self.needed <= self.usable

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        figures = {**dataclasses.asdict(self), "needed_bytes": self.needed, "fits": self.fits}
        return {**figures, "kv_bytes": self.kv.total, "step_seconds": self.step.total}


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """The same sequences divided over copies of the model that share nothing.

    Attributes
    ----------
    devices, batch : int
        Copies, and rows of each.
    needed : int
        Bytes on each device.
    fits : bool
        Whether a device has them.
    step_seconds, tokens_per_second : float
        Of a step, and of all copies together.
    """

    devices: int
    batch: int
    needed: int
    fits: bool
    step_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBytes:
    """What a token takes in one paged layer, outside of the window.

    Attributes
    ----------
    plain, stored, bookkeeping : float
        As the model makes it, as the codec keeps it with its scales, and positions, counts and table entries.
    """

    plain: float
    stored: float
    bookkeeping: float


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A workload in numbers.

    Attributes
    ----------
    workload : Workload
        What was asked for.
    rows : tuple of Row
        For 1, 2, 4, ... devices.
    copies : tuple of Copies
        The same without sharing.
    per_token : TokenBytes
        Of the first paged layer.
    capacity : ShardCapacity
        Of the most loaded shard of a layer, for one sequence.
    crossovers : dict
        By number of devices, the context from which sharding saves time at this batch, None if it never does.
    """

    workload: Workload
    rows: tuple[Row, ...]
    copies: tuple[Copies, ...]
    per_token: TokenBytes
    capacity: ShardCapacity
    crossovers: dict[int, int | None]

    def row(self, devices: int) -> Row:
        """Return the row of so many devices."""
        return next(row for row in self.rows if row.devices == devices)


def lay_out(workload: Workload) -> Layout:
    """Return what a workload needs on each number of devices, without judging it."""
    rows = tuple(make_row(workload, number) for number in _numbers(workload.devices))
    return Layout(
        workload=workload,
        rows=rows,
        copies=tuple(_copies(workload, row.devices) for row in rows),
        per_token=token_bytes(workload),
        capacity=_capacity(workload),
        crossovers={
            # Whatever the tokens' shards: no loads.
            row.devices: crossover(
                workload.model,
                CacheContents(0, workload.batch, workload.options),
                workload.device,
                row.devices,
                row.mode,
            )
            for row in rows[1:]
        },
    )


def make_row(workload: Workload, devices: int) -> Row:
    """Return the figures for so many devices."""
    if workload.mode is not None or devices == 1:
        return _row(workload, devices, workload.mode or "processes")
    several = _row(workload, devices, "processes")
    return several if several.fits else _row(workload, devices, "devices")


def _row(workload: Workload, devices: int, mode: Mode) -> Row:
    model, batch = workload.model, workload.batch
    weights = model.weight_bytes if mode == "processes" else -(-model.weight_bytes // devices)
    step = step_time(model, workload.contents, workload.device, devices, mode)

    def fits(tokens: int, rows: int) -> bool:
        return weights + kv_bytes(workload, tokens, rows, devices, mode).total <= workload.usable

    return Row(
        devices=devices,
        mode=mode,
        weight_bytes=weights,
        kv=kv_bytes(workload, workload.tokens, batch, devices, mode),
        usable=workload.usable,
        max_context=_largest(lambda tokens: fits(tokens, batch), _MOST_TOKENS, workload.options.page_size),
        max_batch=_largest(lambda rows: fits(workload.tokens, rows), _MOST_ROWS),
        step=step,
        tokens_per_second=batch / step.total,
        sent_bytes=sent_bytes(model, batch, devices, mode) / batch,
        read_bytes=_read_bytes(workload, devices, mode) / batch,
    )


def kv_bytes(workload: Workload, tokens: int, batch: int, devices: int, mode: Mode) -> CacheBytes:
    """Return the bytes of K/V on the fullest of so many devices, with the room that pools add when they grow."""
    decoded = min(tokens, DECODED)
    spread = IMBALANCE if devices > 1 else 0.0
    contents = CacheContents(tokens, batch, workload.options, generated=decoded)
    return part_bytes(workload.model, contents, devices, processes=mode == "processes", imbalance=spread)


def _read_bytes(workload: Workload, devices: int, mode: Mode) -> float:
    model, share = workload.model, 1.0 if devices == 1 else min(1.0, (1 + IMBALANCE) / devices)
    total = model.read_weight_bytes(workload.batch) / (1 if mode == "processes" else devices)
    for layer in model.layers:
        kept = stored_tokens(workload.contents, layer, model)
        total += layer_work(
            layer, dataclasses.replace(workload.contents, tokens=kept, share=share), model.dtype
        ).stored_bytes
    return total


def _copies(workload: Workload, devices: int) -> Copies:
    batch = -(-workload.batch // devices)
    kv = kv_bytes(workload, workload.tokens, batch, 1, "processes").total
    needed = int(workload.model.weight_bytes + kv)
    seconds = step_time(workload.model, dataclasses.replace(workload.contents, batch=batch), workload.device).total
    return Copies(devices, batch, needed, needed <= workload.usable, seconds, workload.batch / seconds)


def token_bytes(workload: Workload) -> TokenBytes:
    """Return what a token takes in the first paged layer once its page is full."""
    model, options = workload.model, workload.options
    layer = next(iter(model.paged_layers), model.layers[0])
    plain = float(layer.width * model.element_size)
    packed = options.key_codec != "none" or options.value_codec != "none"
    stored = packed_page_bytes(layer, options, model.dtype) / options.page_size if packed else plain
    notes = 4 + 37 / options.page_size if packed else 6 + 18 / options.page_size
    return TokenBytes(plain, stored, notes)


def _capacity(workload: Workload) -> ShardCapacity:
    model, options = workload.model, workload.options
    layer = next(iter(model.paged_layers), model.layers[0])
    loads = shard_loads(layer, options, workload.loads)
    kept = stored_tokens(workload.contents, layer, model)
    counts = page_counts(kept, options, loads, layer.experts)
    return shard_capacity(counts.tokens, loads, workload.z)


def _numbers(devices: int) -> Sequence[int]:
    """Return 1, 2, 4, ... up to `devices`, and that itself."""
    powers = [1 << power for power in range(devices.bit_length()) if 1 << power <= devices]
    return powers if powers[-1] == devices else [*powers, devices]


def _largest(fits: Callable[[int], bool], most: int, step: int = 1) -> int:
    """Return the largest multiple of `step` up to `most` that fits, 0 if none does."""
    low, high = 0, most // step
    if fits(high * step):
        return high * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step
