"""When a press acts: while a context is read, while its question is answered, or both."""

from dataclasses import dataclass
from typing import Any

from pikv_hf.presses.press_base import KVPRESS


@dataclass(frozen=True, slots=True)
class PressPhases:
    """When a press acts on a context and its question; the rules are those of kvpress's pipeline.

    Attributes
    ----------
    context : bool
        While the context is read, or right after it.
    answer : bool
        While the question is read and answered.
    renumbers : bool
        Whether the tokens kept are numbered anew, so that a question goes on where the cache ends, not the context.
    """

    context: bool
    answer: bool
    renumbers: bool

    @classmethod
    def of(cls, press: Any) -> "PressPhases":
        """Return when a press acts; None never does."""
        if press is None or KVPRESS is None:
            return cls(press is not None, False, False)
        decodes = isinstance(press, (KVPRESS.DecodingPress, KVPRESS.PrefillDecodingPress))
        return cls(
            context=not isinstance(press, KVPRESS.DecodingPress),
            answer=press.decoding if isinstance(press, KVPRESS.DMSPress) else decodes,
            renumbers=isinstance(press, (KVPRESS.KeyRerotationPress, KVPRESS.RestoreKVPress))
            or (isinstance(press, KVPRESS.FinchPress) and press.rerotate_keys),
        )
