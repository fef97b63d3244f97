"""The options of a cache."""

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from .common.budget import Budget, parse_bytes
from .common.suggest import did_you_mean

Placement = Literal["expert", "balanced", "hash"]
SlidingLayers = Literal["bounded", "paged"]
BudgetScope = Literal["cache", "layer", "shard"]

#: What each option may be; policies register themselves under these names.
CODECS = ("none", "int8", "int4", "int2", "fp8", "lowrank", "lowrank+int4", "auto")
ROUTINGS = ("all", "page_bound", "page_mass", "expert_topk", "cache_aware", "adaptive", "hierarchical")
SCHEDULERS = (
    "h2o",
    "lru",
    "lru_plus",
    "streaming_llm",
    "quest",
    "ada_kv",
    "duo",
    "two_queue",
    "reuse_distance",
    "pikv",
)
#: Stands for a decision by all layers together, by token and width, instead of a policy for pages.
JOINT = "joint"
TIERS = ("device", "cpu", "disk")
#: Options that mean something only where `routing` chooses pages.
OF_ROUTING = frozenset({"max_pages", "coverage", "tier_cost"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PiKVConfig:
    """How a :class:`~pikv_hf.PiKVCache` stores keys and values.

    No option changes a result but `key_codec`, `value_codec`, `routing` and `budget`, with what they refer to.

    Parameters
    ----------
    page_size : int
        Tokens per page.
    recent_window : int
        The newest tokens of each sequence that stay in time order before they move, a page at a time, to the shards of
        their experts. Between `recent_window` and `recent_window + page_size - 1` tokens wait there.
    sink_tokens : int
        The first tokens of each sequence that never leave the window, rounded up to whole pages.
    num_shards : int
        Groups of experts; a token leaving the window moves to the shard of its primary expert.
    placement : {"expert", "balanced", "hash"}, optional
        `"expert"` follows the model's own router: neighbouring experts form a shard. `"balanced"` follows it too, and
        groups experts by what the first prompt brings of each, so that shards are about equally large. `"hash"` uses
        `(position // page_size) % num_shards`. By default `"expert"` for an attached model and `"hash"` for a cache
        made from a config alone.
    hot_replicas : int
        Of `"balanced"`: further places, in other shards, for the experts with the most tokens, which then alternate
        between their places. No token is stored twice.
    sliding_layers : {"bounded", "paged"}
        `"bounded"` keeps transformers' own sliding-window layers, which hold no more than the window but cannot be
        cropped once it is full. `"paged"` stores their whole history in pages, as assisted decoding needs.
    key_codec, value_codec : str
        How full pages outside of the window keep keys and values: `"none"` as they came; `"int8"`, `"int4"`, `"int2"`
        quantised; `"fp8"` as float8 e4m3; `"lowrank"` as coefficients of a basis per KV head, `"lowrank+int4"` with
        the quantised rest; `"auto"` each page in the narrowest of int2, int4, int8 and none whose error stays within
        `error_budget`. A page that an integer codec cannot hold well is kept in a wider one.
    error_budget : float
        Of `"auto"`, per page and for its worst head: root mean square error of the attention logits of recent queries
        (keys), relative root mean square error (values). Both are about the relative error of the attention output.
    rank : int, optional
        Of the low-rank codecs, at most the head dim; by default a quarter of it.
    routing : str
        Which full pages outside of the window a decoding step reads: `"all"`, or those that a policy of
        :mod:`pikv_hf.routing.policies` chooses for each KV head: `"page_bound"`, `"page_mass"`, `"expert_topk"`,
        `"cache_aware"`, `"adaptive"`, `"hierarchical"`. Sinks, recent window and pages that are not full are always
        read; calls with several new tokens read everything.
    max_pages : int or float
        Of these pages, the most that a KV head reads in a step; a float is a share of them. Like `coverage` and
        `tier_cost` only where a `routing` chooses.
    coverage : float
        Of `"adaptive"`: the share of the attention to full pages that those read are to take, as far as their bounds
        tell. It reads at least a quarter of `max_pages`.
    tier_cost : float
        Of `"cache_aware"`: how much higher the logits of a page in the slowest tier must be than those of a page in
        memory.
    budget : str, int or float, optional
        The most that may be stored: bytes (`"2GiB"`), tokens per sequence and layer (`4096`), or a share of the tokens
        seen (`0.25`, `"25%"`). What exceeds it is evicted, or packed in fewer bits.
    budget_scope : {"cache", "layer", "shard"}, optional
        What the budget is of. By default bytes are of the cache, which divides them evenly among its layers; tokens are
        of each layer; a share is the same for all.
    scheduler : str, optional
        `"joint"`: all layers decide together which tokens of each KV head stay, and in how many bits, as
        :class:`~pikv_hf.presses.PiKVPress` does. Or which pages go first, by a policy of
        :mod:`pikv_hf.scheduling.policies.registry`: `"h2o"`, `"lru"`, `"lru_plus"`, `"streaming_llm"`, `"quest"`,
        `"ada_kv"`, `"duo"`, `"two_queue"`, `"reuse_distance"`, `"pikv"`. By default `"joint"`; `"pikv"` where codecs,
        tiers, a budget per shard, latents, or several devices or processes leave no room for that; `"lru"` where there
        are only tiers. `repr` of a cache says which it is.
    tiers : dict, optional
        Where full pages go instead of being evicted: the bytes that each of `"device"`, `"cpu"` and `"disk"` may hold,
        as text or number, None for no limit. Tiers left out are not used. On a machine without a GPU, `"cpu"` is where
        attention runs.
    tier_directory : str, optional
        Where the files of `"disk"` go; by default where temporary files do. They have no names there, and are gone with
        the cache.

    Raises
    ------
    TypeError, ValueError
        For a wrong type, a value out of range or an unknown choice, naming both what was given and what is allowed.
    """

    page_size: int = 32
    recent_window: int = 128
    sink_tokens: int = 4
    num_shards: int = 8
    placement: Placement | None = None
    hot_replicas: int = 0
    sliding_layers: SlidingLayers = "bounded"
    key_codec: str = "none"
    value_codec: str = "none"
    error_budget: float = 0.2
    rank: int | None = None
    routing: str = "all"
    max_pages: int | float = 64
    coverage: float = 0.95
    tier_cost: float = 1.0
    budget: str | int | float | None = None
    budget_scope: BudgetScope | None = None
    scheduler: str | None = None
    tiers: dict[str, str | int | None] | None = None
    tier_directory: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("page_size", 1),
            ("recent_window", 0),
            ("sink_tokens", 0),
            ("num_shards", 1),
            ("hot_replicas", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        # Positions and counts of a page are kept in 16-bit integers.
        if self.page_size > 4096:
            raise ValueError(f"page_size must be at most 4096, got {self.page_size}")
        if self.placement is not None:
            _one_of("placement", self.placement, get_args(Placement))
        if self.hot_replicas and self.placement != "balanced":
            raise ValueError(
                f'hot_replicas={self.hot_replicas} are of placement="balanced", got placement={self.placement!r}'
            )
        _one_of("sliding_layers", self.sliding_layers, get_args(SlidingLayers))
        _one_of("key_codec", self.key_codec, CODECS)
        _one_of("value_codec", self.value_codec, CODECS)
        if not isinstance(self.error_budget, int | float) or isinstance(self.error_budget, bool):
            raise TypeError(f"error_budget must be a number, got {self.error_budget!r}")
        if not 0 <= self.error_budget < math.inf:
            raise ValueError(f"error_budget must be at least 0 and finite, got {self.error_budget}")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool)):
            raise TypeError(f"rank must be an int, got {self.rank!r} ({type(self.rank).__name__})")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        self._check_routing()
        self._check_budget()
        self._check_tiers()

    def _check_routing(self) -> None:
        _one_of("routing", self.routing, ROUTINGS)
        for name in ("max_pages", "coverage", "tier_cost"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
        if isinstance(self.max_pages, int) and self.max_pages < 1:
            raise ValueError(f"max_pages must be at least 1, got {self.max_pages}")
        if isinstance(self.max_pages, float) and not 0 < self.max_pages <= 1:
            raise ValueError(f"max_pages as a share must be above 0 and at most 1, got {self.max_pages}")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be above 0 and at most 1, got {self.coverage}")
        if not 0 <= self.tier_cost < math.inf:
            raise ValueError(f"tier_cost must be at least 0 and finite, got {self.tier_cost}")
        if self.routing == "all":
            for name in OF_ROUTING & self.changed().keys():
                raise ValueError(
                    f'{name}={getattr(self, name)} is of routing, and routing="all" reads every page; give one of '
                    f"{', '.join(map(repr, ROUTINGS[1:]))}"
                )

    def _check_budget(self) -> None:
        if self.scheduler is not None:
            _one_of("scheduler", self.scheduler, (*SCHEDULERS, JOINT))
            if self.budget is None and self.tiers is None:
                raise ValueError(
                    f"scheduler={self.scheduler!r} decides what goes first, but neither budget nor tiers say when"
                )
        if self.scheduler == JOINT and (obstacle := self.joint_obstacle()) is not None:
            raise ValueError(f"scheduler={JOINT!r} decides by token and width, which {obstacle} leaves no room for")
        if self.budget_scope is not None:
            _one_of("budget_scope", self.budget_scope, get_args(BudgetScope))
        if self.budget is not None:
            Budget.parse(self.budget)
        elif self.budget_scope is not None:
            raise ValueError(f"budget_scope={self.budget_scope!r} without a budget")

    def joint_obstacle(self) -> str | None:
        """Return the option for which layers cannot decide together what a budget keeps, None if there is none."""
        if self.budget is None:
            return "budget=None"
        if self.tiers is not None:
            return f"tiers={self.tiers!r}"
        if self.budget_scope == "shard":
            return "budget_scope='shard'"
        for name in ("key_codec", "value_codec"):
            if (codec := getattr(self, name)) != "none":
                return f"{name}={codec!r}"
        return None

    def _check_tiers(self) -> None:
        if self.tiers is None:
            return
        if not isinstance(self.tiers, dict) or not self.tiers:
            raise TypeError(
                f"tiers must be a dict of limits by tier, as {{'cpu': '4GiB', 'disk': None}}, got {self.tiers!r}"
            )
        for name, limit in self.tiers.items():
            _one_of("a tier", name, TIERS)
            if isinstance(limit, str):
                parse_bytes(limit, f"the limit of tier {name!r}")
            elif limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
                raise ValueError(f"the limit of tier {name!r} must be text with a unit, bytes or None, got {limit!r}")
        # The caller may go on to change its own.
        object.__setattr__(self, "tiers", dict(self.tiers))

    def changed(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "PiKVConfig":
        """Build a config from :meth:`to_dict`'s result; unknown names raise `TypeError` with a suggestion."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        return cls(**options)

    def to_json(self) -> str:
        """Return the options as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "PiKVConfig":
        """Build a config from :meth:`to_json`'s result."""
        options = json.loads(text)
        if not isinstance(options, dict):
            raise TypeError(f"expected a JSON object of options, got {type(options).__name__}")
        return cls.from_dict(options)


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
