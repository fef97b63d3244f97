"""Whether the keys or the values of tokens are meant."""

import enum


class KV(enum.Enum):
    """The keys or the values of tokens."""

    KEYS = "keys"
    VALUES = "values"
