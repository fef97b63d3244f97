"""Hints for misspelt names."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or an empty string if none is close."""
    names = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f", did you mean {names[close[0]]!r}?" if close else ""
