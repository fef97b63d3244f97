"""Replaying a routing trace on many simulated devices: memory, traffic and time of a sharded cache.

The cache that is simulated is the distributed one of this project. Every device holds the window of each layer (sink
tokens and the newest ones) and the pages of its shards. In each step and layer it attends to its own pages, and one
all-gather of float32 outputs and log-sum-exps merges the parts. Weights, launches and the feed-forward part cost the
same for any placement and are left out here; `pikv plan` counts them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pikv_hf.sharding.load_balancing import imbalance

from ..hardware import Device
from ..model_shape import ModelShape
from ..step_time import attention_seconds, collective_seconds
from .outcome import Claim, Outcome, Simulation, SimulationOptions
from .placements import PLACEMENTS, Placed, devices_per_expert, make_placed, top_share
from .routing_trace import RoutingTrace

#: Numbers of devices that are simulated by default.
COUNTS = (16, 32, 64, 128, 256, 512)
#: Floats of a part's header in the all-gather.
_HEADER_FLOATS = 8


def simulate(
    trace: RoutingTrace,
    shape: ModelShape,
    device: Device,
    options: SimulationOptions | None = None,
    placements: Sequence[str] = tuple(PLACEMENTS),
    counts: Sequence[int] = COUNTS,
) -> Simulation:
    """Replay a trace on several numbers of devices.

    Parameters
    ----------
    trace : RoutingTrace
        Repeated, or cut off, to the context and the model's paged layers.
    shape : ModelShape
        Of the model; bounded sliding layers hold no pages and are left out.
    device : Device
        All devices are alike.
    options : SimulationOptions, optional
        What is simulated.
    placements : sequence of str
        Names of :data:`~pikv_hf.planning.simulate.placements.PLACEMENTS`.
    counts : sequence of int
        Numbers of devices.

    Raises
    ------
    ValueError
        For unknown placements, numbers below 1, models without paged layers, and traces with another number of experts
        than the model's.
    """
    options = options or SimulationOptions()
    if min(counts, default=0) < 1:
        raise ValueError(f"numbers of devices have to be at least 1, got {tuple(counts)}")
    if not shape.paged_layers:
        raise ValueError(f"{shape.name} has no layer that keeps all tokens")
    experts = {layer.experts for layer in shape.paged_layers} - {0}
    if experts and experts != {trace.num_experts}:
        raise ValueError(f"the trace has {trace.num_experts} experts, {shape.name} {sorted(experts)}")
    trace = trace.resized(options.context, len(shape.paged_layers))
    costs = _Costs(shape, device, options)
    outcomes = tuple(_outcome(name, count, trace, costs) for name in placements for count in counts)
    return Simulation(
        model=shape.name,
        trace=trace.model,
        device=device.name,
        options=options,
        layers=len(shape.paged_layers),
        experts=trace.num_experts,
        contexts=tuple(_checkpoints(options)),
        total_bytes=int(costs.widths.sum() * options.context),
        dense_seconds=costs.attention(np.full((len(shape.paged_layers), 1), options.context)),
        moved_kv_bytes=float(costs.widths.mean() * options.stored(options.context)),
        outcomes=outcomes,
        claims=tuple(_claim(count, trace.num_experts, costs) for count in counts),
    )


class _Costs:
    """Bytes and seconds of token counts `(layers, devices)` of one sequence."""

    def __init__(self, shape: ModelShape, device: Device, options: SimulationOptions) -> None:
        layers = shape.paged_layers
        self.device, self.options = device, options
        # Of a token of every sequence, by layer.
        self.widths = np.array([layer.width * shape.element_size * options.batch for layer in layers])
        dims = [layer.query_heads * (layer.key_dim + layer.value_dim) for layer in layers]
        self.flops = 2.0 * options.batch * np.array(dims)
        parts = [options.batch * layer.query_heads * (layer.value_dim + 1) + _HEADER_FLOATS for layer in layers]
        self.parts = 4 * np.array(parts)

    def held(self, loads: npt.NDArray[Any], context: int) -> npt.NDArray[np.float64]:
        """Return the bytes of each device, `(devices,)`: whole pages, and the window."""
        page = self.options.page_size
        window = context - self.options.stored(context)
        held: npt.NDArray[np.float64] = self.widths @ (-(-loads // page) * page + window)
        return held

    def attention(self, loads: npt.NDArray[Any]) -> float:
        """Return the seconds of a step, each layer waiting for its fullest device."""
        fullest = loads.max(axis=1)
        amounts = zip(fullest * self.widths, fullest * self.flops, strict=True)
        return sum(attention_seconds(float(read), float(flops), self.device) for read, flops in amounts)

    def merging(self, devices: int) -> float:
        """Return the seconds of a step's collectives."""
        return sum(collective_seconds(float(part), devices, self.device) for part in self.parts)


def _checkpoints(options: SimulationOptions) -> Iterator[int]:
    yield from range(options.check_every, options.context, options.check_every)
    yield options.context


def _outcome(placement: str, devices: int, trace: RoutingTrace, costs: _Costs) -> Outcome:
    options, layers = costs.options, len(trace.layers)
    sizes = layers, trace.num_experts, devices, options.page_size
    placed = make_placed(placement, *sizes, bound=options.bound, rows=options.batch)
    balance = []
    before = 0
    for context in _checkpoints(options):
        after = options.stored(context)
        positions = np.arange(before, after) + options.sinks
        placed.add(positions, trace.experts[:, positions].astype(np.int64))
        placed.settle()
        balance.append(imbalance(costs.held(placed.stock.sum(axis=1), context)))
        before = after
    return _summary(placement, placed, balance, costs)


def _summary(placement: str, placed: Placed, balance: list[float], costs: _Costs) -> Outcome:
    loads, devices, context = placed.stock.sum(axis=1), placed.devices, costs.options.context
    held = costs.held(loads, context)
    asked = devices_per_expert(placed.stock)
    # The window is attended to by one device, and all others wait.
    window = np.zeros_like(loads)
    window[:, 0] = context - costs.options.stored(context)
    return Outcome(
        placement=placement,
        devices=devices,
        holders=int((loads.sum(axis=0) > 0).sum()),
        bytes_max=int(held.max()),
        bytes_mean=int(held.mean()),
        balance=balance[-1],
        balance_over_time=tuple(balance),
        layer_balance=float(np.mean([imbalance(row) for row in loads])),
        top_share=top_share(placed.stock),
        devices_per_expert=asked,
        replans=placed.replans,
        moved_pages=placed.moved_pages,
        moved_bytes=int(placed.moved_pages * placed.page_size * costs.widths.mean()),
        sent_bytes=int(costs.parts.mean()) if devices > 1 else 0,
        received_bytes=int(costs.parts.mean() * (devices - 1)),
        routed_bytes=float(costs.parts.mean() * min(asked, devices - 1)),
        attention_seconds=costs.attention(loads + window),
        merge_seconds=costs.merging(devices),
    )


def _claim(devices: int, experts: int, costs: _Costs) -> Claim:
    context = costs.options.context
    tokens = context / devices + context / experts
    return Claim(
        devices=devices,
        paper_bytes=float(costs.widths.sum() * tokens),
        paper_seconds=costs.attention(np.full((len(costs.widths), 1), tokens)),
        even_bytes=float(costs.widths.sum() * context / devices),
    )
