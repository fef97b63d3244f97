"""Drawing programs: a family, the options of a cache, and a list of calls."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from families import FAMILIES
from program_alphabet import ALPHABET
from program_models import ATTENTION

#: What the programs leave out, for a while: (call, argument, choice, why); without an argument the call itself.
LEFT_OUT: tuple[tuple[str, str, Any, str], ...] = ()

OPTIONS: dict[str, tuple[Any, ...]] = {
    "page_size": (4, 8, 1, 3, 16),
    "recent_window": (0, 8, 5, 16),
    "sink_tokens": (0, 2, 5),
    "num_shards": (1, 3, 8),
    "sliding_layers": ("bounded", "paged"),
}
#: Bytes of fast memory for each token of a page: the few pages that a step needs at once, not all of a long prompt.
TIERED: tuple[int | None, ...] = (None, None, None, None, 12 * 1024)
DEVICES: tuple[list[str] | None, ...] = (None, None, None, None, ["cpu:0", "cpu:1"], ["cpu:0", "cpu:1", "cpu:2"])


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a program: an operation of the alphabet and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is run on both caches.

    Attributes
    ----------
    family : str
        Of `FAMILIES`.
    attention : str
        What DynamicCache is run with: `"sdpa"`, or `"eager"`.
    attached : bool
        Whether the cache is made for an attached model, or from its config alone.
    devices : list of str or None
        Where its shards are.
    options : dict
        Of `PiKVConfig`.
    batch : int
        Rows of the first call.
    autocast : bool
        Whether calls are made under bf16 autocast.
    calls : tuple of Call
        In order.
    """

    family: str
    attention: str
    attached: bool
    devices: list[str] | None
    options: dict[str, Any]
    batch: int
    autocast: bool
    calls: tuple[Call, ...]

    @property
    def all_experts(self) -> bool:
        """Whether models take all experts: in lower precision rounding alone would choose others."""
        lower = (call.name == "dtype" or call.arguments.get("context") == "autocast" for call in self.calls)
        return self.autocast or any(lower)


Choose = Callable[[Sequence[Any]], Any]
_FIRST = ("forward", "forward", "generate")


def _choices(name: str, argument: str) -> tuple[Any, ...]:
    left_out = [choice for call, where, choice, _ in LEFT_OUT if (call, where) == (name, argument)]
    return tuple(choice for choice in ALPHABET[name].choices[argument] if choice not in left_out)


#: The calls that are drawn, each as often as it weighs.
NAMES = [
    name
    for name, known in ALPHABET.items()
    if all(_choices(name, argument) for argument in known.choices) and (name, "") not in {left[:2] for left in LEFT_OUT}
    for _ in range(known.weight)
]


def draw_call(choose: Choose, names: Sequence[str]) -> Call:
    """Draw one call of these kinds."""
    name = choose(names)
    return Call(name, {argument: choose(_choices(name, argument)) for argument in ALPHABET[name].choices})


def draw_program(choose: Choose) -> Program:
    """Draw a program; `choose` picks one of a sequence."""
    family = choose(list(FAMILIES))
    attached = choose((True, True, True, False))
    options = {name: choose(choices) for name, choices in OPTIONS.items()}
    devices = None
    if attached:
        options["placement"] = choose(("expert", "hash", "balanced")) if FAMILIES[family].routed else "hash"
        options["hot_replicas"] = choose((0, 1)) if options["placement"] == "balanced" else 0
        room = choose(TIERED)
        options["tiers"] = None if room is None else {"cpu": room * options["page_size"], "disk": None}
        devices = choose(DEVICES)
    calls = [draw_call(choose, _FIRST), *(draw_call(choose, NAMES) for _ in range(choose((1, 2, 3, 4, 6))))]
    attention = ATTENTION.get(family) or choose(("sdpa", "sdpa", "eager"))
    autocast = choose((*(False,) * 11, True))
    return Program(family, attention, attached, devices, options, choose((1, 2, 3)), autocast, tuple(calls))
