"""How much a press may keep: a share, a number of tokens, or bytes."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "tokens", "bytes"]
Given = float | int | str

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%|[a-zA-Z]+)\s*")


@dataclass(frozen=True, slots=True)
class PressBudget:
    """What a press may keep of the context.

    Attributes
    ----------
    kind : str
        `"share"` of the bytes that `DynamicCache` would hold in the model's dtype; `"tokens"` per KV head; `"bytes"`
        for all layers but bounded sliding ones.
    amount : float
        Of that kind.
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, given: Given) -> "PressBudget":
        """Read a budget as users write it.

        Parameters
        ----------
        given : float, int or str
            `0.25` or `"25%"`: a share. `512` or `"512 tokens"`: tokens per KV head. `"64 MiB"`: bytes.

        Raises
        ------
        TypeError, ValueError
            For anything else, or a share that is not above 0 and at most 1.

        Examples
        --------
        >>> PressBudget.parse("12.5%")
        PressBudget(kind='share', amount=0.125)
        """
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise TypeError(f"a budget is a share, a number of tokens or bytes, got {given!r} ({type(given).__name__})")
        if isinstance(given, str):
            return cls._of_text(given)
        return cls._checked("tokens" if isinstance(given, int) else "share", float(given), given)

    @classmethod
    def _of_text(cls, given: str) -> "PressBudget":
        match = _TEXT.fullmatch(given)
        if match is not None:
            amount, unit = float(match[1]), match[2].lower()
            if unit == "%":
                return cls._checked("share", amount / 100, given)
            if unit in ("token", "tokens"):
                return cls._checked("tokens", amount, given)
            if unit in _UNITS:
                return cls._checked("bytes", amount * _UNITS[unit], given)
        raise ValueError(f"a budget is written like '25%', '512 tokens' or '64 MiB', got {given!r}")

    @classmethod
    def _checked(cls, kind: Kind, amount: float, given: Given) -> "PressBudget":
        if not amount > 0 or (kind == "share" and amount > 1):
            raise ValueError(f"a budget is above 0, and a share at most 1, got {given!r}")
        return cls(kind, amount)

    def share(self, tokens: int, nbytes: int) -> float:
        """Return the budget as a share of `tokens` per KV head, which take `nbytes` as they are; at most 1."""
        whole = {"share": 1.0, "tokens": float(tokens), "bytes": float(nbytes)}[self.kind]
        return min(1.0, self.amount / max(whole, 1.0))
