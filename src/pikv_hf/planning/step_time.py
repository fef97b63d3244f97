"""The time of a decoding step, from bytes and operations: rooflines and the alpha-beta model of collectives.

Roofline: Williams, Waterman and Patterson, 2009. Alpha-beta costs of collectives: Thakur, Rabenseifner and Gropp, 2005.
"""

import dataclasses
import math
from typing import Literal

from .attention_work import AttentionWork, layer_work
from .cache_contents import CacheContents
from .cache_memory import stored_tokens
from .hardware import Device
from .model_shape import LayerShape, ModelShape

Mode = Literal["processes", "devices"]

#: The most by which the busiest of several devices may exceed its equal share of the pages: hot shards are split.
IMBALANCE = 0.1

#: Numbers before the results of a rank, float32.
HEADER = 8

#: Launches for a collective and the merge of its results, as a share of all launches of a layer.
MERGE_SHARE = 0.1

#: Launches on a further device by the one process that drives all, as a share of all launches of a layer.
LAUNCH_SHARE = 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a decoding step of the whole model.

    Attributes
    ----------
    weights : float
        Reading weights, or multiplying with them, whichever takes longer.
    attention : float
        Attention over stored tokens on the busiest device.
    exchange : float
        Queries and partial results between devices.
    overhead : float
        Host work and launches.
    """

    weights: float
    attention: float
    exchange: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the step: nothing overlaps."""
        return self.weights + self.attention + self.exchange + self.overhead


def attention_seconds(bytes_read: float, flops: float, device: Device) -> float:
    """Return the time in which a device reads and computes so much: the slower of the two, without any overhead.

    Parameters
    ----------
    bytes_read : float
        Bytes from the device's memory.
    flops : float
        Floating-point operations.
    device : Device
        Where it happens.

    Raises
    ------
    ValueError
        For negative amounts.
    """
    if bytes_read < 0 or flops < 0:
        raise ValueError(f"bytes_read and flops must not be negative, got {bytes_read} and {flops}")
    reading = bytes_read / (device.bandwidth * device.attained_bandwidth)
    return max(reading, flops / (device.flops * device.attained_flops))


def collective_seconds(bytes_per_rank: float, ranks: int, device: Device) -> float:
    """Return the time of a ring all-gather in which every rank contributes `bytes_per_rank`; 0 for one rank.

    Raises
    ------
    ValueError
        If `ranks` is less than 1 or the bytes are negative.
    """
    if ranks < 1 or bytes_per_rank < 0:
        raise ValueError(f"ranks must be at least 1 and bytes_per_rank at least 0, got {ranks} and {bytes_per_rank}")
    return (ranks - 1) * (device.link_latency + bytes_per_rank / device.link_bandwidth)


def result_bytes(layer: LayerShape, batch: int) -> int:
    """Return the bytes of one device's partial results of a layer: outputs, their LSE and a header, float32."""
    return 4 * (batch * layer.query_heads * (layer.value_dim + 1) + HEADER)


def work_seconds(work: AttentionWork, device: Device) -> float:
    """Return the time of one layer's attention on a device, without overhead."""
    stored, flops, coded = work.bytes_read + (device.rates.copies - 1) * work.scattered_bytes, work.flops, 0.0
    for codec, numbers, size, products in work.coded:
        if (rate := device.rates.codes.get(codec)) is not None:
            # Such a rate has reading, products and softmax in it.
            coded += numbers / rate
        else:
            stored, flops = stored + size / device.rates.coded_share, flops + products
    return attention_seconds(stored, flops, device) + coded + work.logits / device.rates.logits


def layer_seconds(layer: LayerShape, contents: CacheContents, dtype: str, device: Device) -> float:
    """Return the time of a layer's step on one device: appending a token and attending to what it keeps.

    This is what `pikv bench decode` times. `contents` are what the layer stores on this device.
    """
    work = layer_work(layer, contents, dtype)
    more = 0.0
    if layer.sliding is None:
        more += device.rates.routed_overhead if contents.options.routing != "all" else 0.0
        more += device.rates.coded_overhead if work.coded else 0.0
    return work_seconds(work, device) + device.overhead + more


def step_time(
    model: ModelShape, contents: CacheContents, device: Device, devices: int = 1, mode: Mode = "processes"
) -> StepTime:
    """Return the time of one decoding step of all rows.

    Parameters
    ----------
    model : ModelShape
        What is run.
    contents : CacheContents
        Its `tokens` are those seen by each row.
    device : Device
        Of a kind.
    devices : int
        How many share the cache.
    mode : {"processes", "devices"}
        A process per device, each with all weights; or one process, whose layers are divided over the devices and run
        on one of them at a time, while all attend to their pages.

    Raises
    ------
    ValueError
        For sizes that are not positive.
    """
    tokens, batch = contents.tokens, contents.batch
    if tokens < 0 or batch < 1 or devices < 1:
        raise ValueError(f"tokens, batch and devices must be positive, got {tokens}, {batch} and {devices}")
    share = 1.0 if devices == 1 else min(1.0, (1 + IMBALANCE) / devices)
    attention = exchange = overhead = 0.0
    known: dict[LayerShape, tuple[float, float, float]] = {}
    for layer in model.layers:
        if layer not in known:
            kept = dataclasses.replace(contents, tokens=stored_tokens(contents, layer, model), share=share)
            every = layer_seconds(layer, kept, model.dtype, device)
            fixed = device.overhead
            alone = layer.sliding is not None or devices == 1
            sent = 0.0 if alone else exchange_seconds(layer, batch, model.element_size, device, devices, mode)
            extra = 0.0 if alone else _launches(devices, mode) * device.overhead
            known[layer] = every - fixed, sent, fixed + extra
        attention, exchange, overhead = (
            a + b for a, b in zip((attention, exchange, overhead), known[layer], strict=True)
        )
    weights = attention_seconds(model.read_weight_bytes(batch), 2 * batch * model.active_params(), device)
    return StepTime(weights, attention, exchange, overhead)


def exchange_seconds(
    layer: LayerShape, batch: int, element_size: int, device: Device, devices: int, mode: Mode
) -> float:
    """Return the time that one layer's partial results take between devices."""
    results = result_bytes(layer, batch)
    if mode == "processes":
        return collective_seconds(results, devices, device)
    # One process: queries to each other device, its results back, all through the links of the layer's own device.
    queries = _query_bytes(layer, batch, element_size)
    return (devices - 1) * (2 * device.link_latency + (queries + results) / device.link_bandwidth)


def _launches(devices: int, mode: Mode) -> float:
    return MERGE_SHARE if mode == "processes" else MERGE_SHARE + LAUNCH_SHARE * (devices - 1)


def sent_bytes(model: ModelShape, batch: int, devices: int, mode: Mode = "processes") -> float:
    """Return the bytes that a device sends in a step, on average; they do not depend on the context.

    A ring passes on what comes: each of G processes sends G - 1 results per layer. In one process each device sends its
    results to the layer's own, and that its queries to each of the others.
    """
    if mode == "processes":
        return float(sum((devices - 1) * result_bytes(layer, batch) for layer in model.paged_layers))
    each = sum(result_bytes(x, batch) + _query_bytes(x, batch, model.element_size) for x in model.paged_layers)
    return (devices - 1) / devices * each


def _query_bytes(layer: LayerShape, batch: int, element_size: int) -> int:
    return batch * layer.query_heads * layer.key_dim * element_size


def crossover(
    model: ModelShape,
    contents: CacheContents,
    device: Device,
    devices: int,
    mode: Mode = "processes",
    limit: int = 1 << 24,
) -> int | None:
    """Return the least context from which a step on several devices takes less time than on one; None up to `limit`.

    A single device is taken to have room for it, which it need not have. The tokens of `contents` are not looked at.
    """

    def pays(tokens: int) -> bool:
        longer = dataclasses.replace(contents, tokens=tokens)
        alone, several = (step_time(model, longer, device, n, mode).total for n in (1, devices))
        return several < alone

    if devices == 1 or not pays(limit):
        return None
    low, high, size = 0, limit, contents.options.page_size
    while high - low > max(1, size):
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return math.ceil(high / size) * size
