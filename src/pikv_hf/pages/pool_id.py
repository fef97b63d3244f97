"""The identity of a pool within its layer: the codecs of the keys and values in it."""

from typing import NamedTuple

from ..codecs.codec import is_lowrank


class PoolId(NamedTuple):
    """Names a pool of a layer by the codecs of its keys and values; a layer has one pool for each such pair.

    Attributes
    ----------
    key_codec, value_codec : str or None
        Names of codecs; both None for :data:`PLAIN`.
    """

    key_codec: str | None
    value_codec: str | None

    @property
    def name(self) -> str:
        """`"int4"`, `"int4/int2"` where keys and values differ, `"plain"` for :data:`PLAIN`."""
        if self.key_codec is None or self.value_codec is None:
            return "plain"
        return self.key_codec if self.key_codec == self.value_codec else f"{self.key_codec}/{self.value_codec}"

    @classmethod
    def parse(cls, name: str) -> "PoolId":
        """Return the pool that has this :attr:`name`."""
        if name == PLAIN.name:
            return PLAIN
        key_codec, _, value_codec = name.partition("/")
        return cls(key_codec, value_codec or key_codec)

    @property
    def is_lowrank(self) -> bool:
        """Whether keys or values are coefficients of a basis, which belongs to a KV head."""
        return any(codec is not None and is_lowrank(codec) for codec in self)


#: The pool of pages that keep their tokens as they came: window, open pages, and what no codec took.
PLAIN = PoolId(None, None)

#: The pool of full pages that keep their tokens as they came, of layers whose full pages all leave the plain pool.
UNCODED = PoolId("none", "none")
