"""How much a press may keep: a share, a number of tokens, or bytes."""

from dataclasses import dataclass

from pikv_hf.common.budget import Unit, parse_amount

Given = float | int | str


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

    kind: Unit
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
            parsed = parse_amount(given)
            if parsed is None:
                raise ValueError(f"a budget is written like '25%', '512 tokens' or '64 MiB', got {given!r}")
            return cls._checked(parsed[1], parsed[0], given)
        return cls._checked("tokens" if isinstance(given, int) else "share", float(given), given)

    @classmethod
    def _checked(cls, kind: Unit, amount: float, given: Given) -> "PressBudget":
        if not amount > 0 or (kind == "share" and amount > 1):
            raise ValueError(f"a budget is above 0, and a share at most 1, got {given!r}")
        return cls(kind, amount)

    def share(self, tokens: int, nbytes: int) -> float:
        """Return the budget as a share of `tokens` per KV head, which take `nbytes` as they are; may be more than 1."""
        whole = {"share": 1.0, "tokens": float(tokens), "bytes": float(nbytes)}[self.kind]
        return self.amount / max(whole, 1.0)
