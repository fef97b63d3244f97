"""A small table of devices: what their makers state about memory, arithmetic and links."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from pikv_hf.common.suggest import did_you_mean


@dataclasses.dataclass(frozen=True, slots=True)
class KernelRates:
    """What bounds a device's attention kernels besides memory and matrix products. By default nothing does.

    A GPU's kernels keep logits and unpacked codes in registers. On a CPU both go through its caches.

    Attributes
    ----------
    logits : float
        Logits per second that a softmax takes.
    codes : mapping of str to float
        By codec, packed numbers per second that attention reads, all included.
    coded_share : float
        Of memory's speed, what packed numbers of other codecs are read at.
    copies : float
        Times that memory is passed to attend to scattered pages: 1 where a kernel looks pages up, 3 where they are
        read, written side by side and read again.
    routed_overhead, coded_overhead : float
        Seconds by which routing, and a pool of packed pages, lengthen a layer's step, whatever they read.
    """

    logits: float = math.inf
    codes: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    coded_share: float = 1.0
    copies: float = 1.0
    routed_overhead: float = 0.0
    coded_overhead: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A device and its link to the others of a node.

    Attributes
    ----------
    name : str
        As in :data:`DEVICES`.
    memory : int
        Bytes.
    bandwidth : float
        Of its memory, bytes per second, as stated.
    flops : float
        Floating-point operations per second of dense matrix products in bfloat16, as stated.
    link_latency : float
        Seconds per message of a collective, the alpha of the alpha-beta model.
    link_bandwidth : float
        Bytes per second in one direction between two devices of a node.
    overhead : float
        Seconds of host work and launches per layer and step, whatever is read.
    attained_bandwidth, attained_flops : float
        The shares of `bandwidth` and `flops` that kernels reach; 1 where both were measured.
    rates : KernelRates
        What else bounds its kernels.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link_latency: float
    link_bandwidth: float
    overhead: float
    attained_bandwidth: float = 0.9
    attained_flops: float = 0.8
    rates: KernelRates = dataclasses.field(default_factory=KernelRates)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:-1]:
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in ("link_latency", "overhead")):
                raise ValueError(f"{field.name} of device {self.name!r} must be positive, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """Return what there is to know as plain values."""
        figures = dataclasses.asdict(self)
        # JSON knows no infinity.
        figures["rates"]["logits"] = None if math.isinf(self.rates.logits) else self.rates.logits
        return figures


# Per layer and step of a GPU: launches of transformers' eager decoder layer and of this cache's attention.
_EAGER = 0.6e-3
# Fused kernels over int4 are reported from as many tokens per second as over bfloat16 (a quarter of memory's speed) to
# three times as many: a middle.
_GPU_RATES = KernelRates(coded_share=0.5)
# A CPU: the softmax and unpacking of a few cores; see above for copies.
_CPU_RATES = KernelRates(
    1e9, dict.fromkeys(("int8", "int4", "int2", "fp8", "lowrank+int4"), 1.2e9), 1.0, 3.0, 2e-3, 1e-3
)
# Per message between GPUs of a node: peer to peer over NVLink or Infinity Fabric, and through the host over PCIe.
_DIRECT, _PCIE = 4e-6, 10e-6

_TABLE = (
    # NVIDIA B200 (HGX B200 data sheet): 180 GB HBM3e, 7.7 TB/s, 2.25 PFLOP/s, NVLink 5 with 1.8 TB/s both ways.
    Device("B200", 180 * 10**9, 7.7e12, 2.25e15, _DIRECT, 900e9, _EAGER, rates=_GPU_RATES),
    # NVIDIA H200 SXM data sheet: 141 GB HBM3e, 4.8 TB/s, 989 TFLOP/s, NVLink 4 with 900 GB/s both ways.
    Device("H200", 141 * 10**9, 4.8e12, 989e12, _DIRECT, 450e9, _EAGER, rates=_GPU_RATES),
    # NVIDIA H100 SXM data sheet: 80 GB HBM3, 3.35 TB/s, 989 TFLOP/s, NVLink 4 with 900 GB/s both ways.
    Device("H100", 80 * 10**9, 3.35e12, 989e12, _DIRECT, 450e9, _EAGER, rates=_GPU_RATES),
    # NVIDIA A100 SXM data sheet: HBM2e, 2,039 and 1,555 GB/s, 312 TFLOP/s, NVLink 3 with 600 GB/s both ways.
    Device("A100-80GB", 80 * 10**9, 2.039e12, 312e12, _DIRECT, 300e9, _EAGER, rates=_GPU_RATES),
    Device("A100-40GB", 40 * 10**9, 1.555e12, 312e12, _DIRECT, 300e9, _EAGER, rates=_GPU_RATES),
    # NVIDIA L40S data sheet: 48 GB GDDR6, 864 GB/s, 362 TFLOP/s, PCIe 4 x16 with 64 GB/s both ways.
    Device("L40S", 48 * 10**9, 864e9, 362e12, _PCIE, 32e9, _EAGER, rates=_GPU_RATES),
    # NVIDIA Ada whitepaper, GeForce RTX 4090: 24 GB GDDR6X, 1,008 GB/s, 165.2 TFLOP/s, PCIe 4 x16.
    Device("RTX4090", 24 * 10**9, 1.008e12, 165.2e12, _PCIE, 32e9, _EAGER, rates=_GPU_RATES),
    # AMD Instinct MI300X data sheet: 192 GB HBM3, 5.3 TB/s, 1,307 TFLOP/s, Infinity Fabric links of 128 GB/s both ways.
    Device("MI300X", 192 * 10**9, 5.3e12, 1307e12, _DIRECT, 64e9, _EAGER, rates=_GPU_RATES),
    # A server CPU, processes on one host: what calibration replaces by measurements of the machine at hand.
    Device("cpu", 64 * 2**30, 20e9, 200e9, 50e-6, 2e9, 1e-3, 1.0, 1.0, _CPU_RATES),
)

#: Devices by name.
DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}


def find_device(name: str) -> Device:
    """Return the device of a name, in upper or lower case.

    Raises
    ------
    ValueError
        For an unknown name, with the closest known one.
    """
    by_lower = {known.lower(): device for known, device in DEVICES.items()}
    if (device := by_lower.get(name.strip().lower())) is None:
        raise ValueError(f"unknown device {name!r}{did_you_mean(name, DEVICES)} (known: {', '.join(DEVICES)})")
    return device


def parse_devices(text: str) -> tuple[int, Device]:
    """Return the number and kind of devices that `"8xH200"` or `"H200"` means.

    Raises
    ------
    ValueError
        For an unknown device, or a number that is not positive.
    """
    match = re.fullmatch(r"\s*(?:(-?\d+)\s*x\s*)?(\S.*?)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"devices must be as '8xH200' or 'H200', got {text!r}")
    count = int(match[1] or 1)
    if count < 1:
        raise ValueError(f"the number of devices must be at least 1, got {count} in {text!r}")
    return count, find_device(match[2])
