"""How much a cache may hold: bytes, tokens, or a share of what a full cache would."""

import dataclasses
import math
import re
from typing import Literal

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")

Unit = Literal["bytes", "tokens", "share"]


def parse_bytes(text: str, name: str = "size") -> int:
    """Return the bytes that a text such as `"2GiB"` or `"500 MB"` stands for.

    Raises
    ------
    ValueError
        For anything else, with what is allowed.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{name} must be a number with one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """A limit, from :class:`~pikv_hf.PiKVConfig`'s `budget`.

    Attributes
    ----------
    amount : float
        Bytes, tokens, or a share in (0, 1).
    unit : {"bytes", "tokens", "share"}
        What `amount` counts. Tokens are those of a sequence in a layer, or in a shard of it; a share is one of the
        tokens that the sequence has seen.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, budget: str | int | float) -> "Budget":
        """Read `"2GiB"` (bytes), `4096` (tokens) or `0.25` (a share).

        Raises
        ------
        TypeError, ValueError
            For another type, an unknown unit, less than one token or byte, or a share outside of (0, 1).
        """
        if isinstance(budget, str):
            budget_bytes = parse_bytes(budget, "budget")
            if budget_bytes < 1:
                raise ValueError(f"budget must be at least 1 byte, got {budget!r}")
            return cls(budget_bytes, "bytes")
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise TypeError(f"budget must be text with a unit, tokens or a share, got {budget!r}")
        if isinstance(budget, int):
            if budget < 1:
                raise ValueError(f"a budget in tokens must be at least 1, got {budget}")
            return cls(budget, "tokens")
        if not (math.isfinite(budget) and 0 < budget < 1):
            raise ValueError(f"a budget that is a share must be between 0 and 1, got {budget} (whole tokens are ints)")
        return cls(budget, "share")
