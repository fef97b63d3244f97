"""The options of what is loaded: those that were saved, with what is asked for in their place."""

from collections.abc import Mapping
from typing import Any

from ..config import OF_ROUTING, PiKVConfig


def loaded_options(saved: Mapping[str, Any], asked_for: Mapping[str, Any]) -> PiKVConfig:
    """Return the options of a saved cache, layer or table with others in place of some.

    What belongs to routing is left out where there is none: files of early releases have it, and who loads a cache may
    end its routing.

    Raises
    ------
    TypeError, ValueError
        As :class:`PiKVConfig`.
    """
    options = {**saved, **asked_for}
    if options.get("routing", "all") == "all":
        options = {name: value for name, value in options.items() if name in asked_for or name not in OF_ROUTING}
    return PiKVConfig.from_dict(options)
