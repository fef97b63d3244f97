"""How much a cache may hold: bytes, tokens, or a share of what a full cache would."""

import dataclasses
import math
import re
from typing import Literal

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%|[A-Za-z]+)\s*")
_NAMES_OF_UNITS = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"

Unit = Literal["bytes", "tokens", "share"]
#: How a budget may be written, for messages.
_WAYS = f"a share (0.25 or '25%'), tokens (4096 or '4096 tokens') or bytes ('2GiB'; units {_NAMES_OF_UNITS})"


def parse_amount(text: str) -> tuple[float, Unit] | None:
    """Return what a text such as `"25%"`, `"512 tokens"` or `"64 MiB"` says, None if nothing that is known.

    Percent come as a share: 0.25.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    amount, unit = float(match[1]), match[2].upper()
    if unit == "%":
        return amount / 100, "share"
    if unit in ("TOKEN", "TOKENS"):
        return amount, "tokens"
    return (amount * _UNITS[unit], "bytes") if unit in _UNITS else None


def parse_bytes(text: str, name: str = "size") -> int:
    """Return the bytes that a text such as `"2GiB"` or `"500 MB"` stands for.

    Raises
    ------
    ValueError
        For anything else, with what is allowed.
    """
    parsed = parse_amount(text)
    if parsed is None or parsed[1] != "bytes":
        raise ValueError(f"{name} must be a number with one of {_NAMES_OF_UNITS}, got {text!r}")
    return int(parsed[0])


def bytes_text(count: float) -> str:
    """Return a number of bytes as a budget is written, rounded up: `"1.5MiB"`."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if count >= _UNITS[name.upper()]), "B")
    tenths = math.ceil(count * 10 / _UNITS[unit.upper()])
    return f"{math.ceil(count)}B" if unit == "B" else f"{tenths / 10:.1f}{unit}"


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
        """Read `"2GiB"` (bytes), `4096` or `"4096 tokens"`, `0.25` or `"25%"` (a share).

        Raises
        ------
        TypeError, ValueError
            For another type, an unknown unit, less than one token or byte, or a share outside of (0, 1).
        """
        if isinstance(budget, bool) or not isinstance(budget, str | int | float):
            raise TypeError(f"budget must be {_WAYS}, got {budget!r} ({type(budget).__name__})")
        amount: float
        unit: Unit
        if isinstance(budget, str):
            parsed = parse_amount(budget)
            if parsed is None:
                raise ValueError(f"budget must be {_WAYS}, got {budget!r}")
            amount, unit = parsed
        else:
            amount, unit = budget, "tokens" if isinstance(budget, int) else "share"
        if unit == "share":
            _check_share(amount, budget)
        elif not amount >= 1:
            raise ValueError(f"a budget in {unit} must be at least 1, got {budget!r}")
        return cls(amount if unit == "share" else int(amount), unit)


def _check_share(share: float, given: object) -> None:
    if share == 1:
        raise ValueError(
            f"budget={given!r} is everything, which is kept without a budget: leave it out, or give {_WAYS}"
        )
    if not (math.isfinite(share) and 0 < share < 1):
        raise ValueError(
            f"a budget that is a share must be above 0 and below 1, got {given!r}; a number of tokens is written "
            "without a point: 4096"
        )
