"""What is simulated, and what a simulation finds."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """What is simulated.

    Attributes
    ----------
    context : int
        Tokens that every sequence has at the end.
    batch : int
        Sequences; all follow the trace, so that their skews add up.
    page_size, recent_window, sink_tokens : int
        As in :class:`~pikv_hf.PiKVConfig`.
    bound : float
        Skew from which the balanced placement is re-planned: the fullest device over the mean, less one.
    check_every : int
        Tokens between two looks at memory and skew.
    """

    context: int = 131072
    batch: int = 1
    page_size: int = 32
    recent_window: int = 128
    sink_tokens: int = 4
    bound: float = 0.1
    check_every: int = 4096

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("bound", "recent_window", "sink_tokens") else 1
            if (value := getattr(self, field.name)) < least:
                raise ValueError(f"{field.name} has to be at least {least}, got {value}")

    @property
    def sinks(self) -> int:
        """Sink tokens, rounded up to whole pages."""
        return -(-self.sink_tokens // self.page_size) * self.page_size

    def stored(self, context: int) -> int:
        """Return how many tokens of a context have left the window: whole pages after the sinks."""
        return max(0, context - self.sinks - self.recent_window) // self.page_size * self.page_size


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """A placement on a number of devices, at the end of the context unless said otherwise.

    Attributes
    ----------
    placement : str
        One of :data:`~pikv_hf.planning.simulate.placements.PLACEMENTS`.
    devices : int
        G.
    holders : int
        Devices that hold any page.
    bytes_max, bytes_mean : int
        K/V of the fullest device and of the mean, window and partly filled pages included.
    balance : float
        Their ratio.
    balance_over_time : tuple of float
        The same at each of :attr:`Simulation.contexts`.
    layer_balance : float
        Tokens in pages of a layer's fullest device over the mean, mean over layers: what a layer's step waits for.
    top_share, devices_per_expert : float
        Of an expert's tokens in a layer: the share on its most frequent device, and how many devices hold any; means
        over tokens.
    replans, moved_pages, moved_bytes : int
        Layers re-planned until the end, what moved between devices for it.
    sent_bytes, received_bytes : int
        Per device, layer and step: its own part, and all others' parts, to merge the attention over all pages.
    routed_bytes : float
        The same for a step that reads no pages but those of one expert: parts of the devices that hold them.
    attention_seconds, merge_seconds : float
        Of a decoding step, all layers: the slowest device's attention over its pages, and the collectives.
    """

    placement: str
    devices: int
    holders: int
    bytes_max: int
    bytes_mean: int
    balance: float
    balance_over_time: tuple[float, ...]
    layer_balance: float
    top_share: float
    devices_per_expert: float
    replans: int
    moved_pages: int
    moved_bytes: int
    sent_bytes: int
    received_bytes: int
    routed_bytes: float
    attention_seconds: float
    merge_seconds: float

    @property
    def step_seconds(self) -> float:
        """Attention and merging."""
        return self.attention_seconds + self.merge_seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What formulas say for a number of devices, without window, pages or skew.

    Attributes
    ----------
    devices : int
        G.
    paper_bytes, paper_seconds : float
        PiKV's O(L/G + L/E) tokens per device (arXiv 2508.06526, section 3.1): their K/V, and reading them in each step.
    even_bytes : float
        L/G tokens.
    """

    devices: int
    paper_bytes: float
    paper_seconds: float
    even_bytes: float


@dataclasses.dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulation found.

    Attributes
    ----------
    model, trace, device : str
        What was replayed, and on what.
    options : SimulationOptions
        What was simulated.
    layers, experts : int
        Paged layers, and experts of the trace.
    contexts : tuple of int
        Lengths at which memory was looked at.
    total_bytes : int
        K/V of all sequences: what one device holds without sharding, the dense O(L).
    dense_seconds : float
        Attention of a step over all of it on one device.
    moved_kv_bytes : float
        Per layer and step, the K/V of all pages: what would travel if keys and values came to the query.
    outcomes : tuple of Outcome
        By placement, then number of devices.
    claims : tuple of Claim
        By number of devices.
    """

    model: str
    trace: str
    device: str
    options: SimulationOptions
    layers: int
    experts: int
    contexts: tuple[int, ...]
    total_bytes: int
    dense_seconds: float
    moved_kv_bytes: float
    outcomes: tuple[Outcome, ...]
    claims: tuple[Claim, ...]

    def of(self, placement: str) -> list[Outcome]:
        """Return the outcomes of a placement, by number of devices."""
        return [outcome for outcome in self.outcomes if outcome.placement == placement]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return dataclasses.asdict(self)
