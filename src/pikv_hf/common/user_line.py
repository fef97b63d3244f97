"""Where a warning points: at the line of whoever called the model, not into a package in between."""

import sys

#: Packages through which calls come from a user's line to a cache.
_BETWEEN = frozenset({"pikv_hf", "torch", "transformers", "kvpress", "accelerate", "peft"})


def user_stacklevel() -> int:
    """Return the `stacklevel` with which `warnings.warn`, called by the caller of this, names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    return level
