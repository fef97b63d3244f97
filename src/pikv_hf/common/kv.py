"""Which half of a token's K/V is meant."""

import enum


class KV(enum.Enum):
    """The keys or the values of tokens."""

    KEYS = "keys"
    VALUES = "values"
