"""The options of a cache."""

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from pikv_hf.suggest import did_you_mean

Placement = Literal["expert", "hash"]
SlidingLayers = Literal["bounded", "paged"]
CodecName = Literal["none", "int8", "int4", "int2", "fp8", "lowrank", "lowrank+int4", "auto"]
CODECS: tuple[str, ...] = get_args(CodecName)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PiKVConfig:
    """How a :class:`~pikv_hf.PiKVCache` stores keys and values.

    No option changes a result but `key_codec` and `value_codec`, with what they refer to.

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
    placement : {"expert", "hash"}, optional
        `"expert"` follows the model's own router, `"hash"` uses `(position // page_size) % num_shards`. By default
        `"expert"` for an attached model and `"hash"` for a cache made from a config alone.
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
    sliding_layers: SlidingLayers = "bounded"
    key_codec: str = "none"
    value_codec: str = "none"
    error_budget: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("page_size", 1), ("recent_window", 0), ("sink_tokens", 0), ("num_shards", 1)):
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
