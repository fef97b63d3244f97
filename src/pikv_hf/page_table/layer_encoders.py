"""Encoding the full pages of a layer: one encoder for keys, one for values, with the queries and bases they need."""

from typing import NamedTuple

import numpy as np
import torch

from ..codecs.codec import Codec
from ..codecs.page_encoder import Encoded, PageEncoder
from ..common.kv import KV
from ..config import PiKVConfig
from ..pages.page_contents import PageContents
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import UNCODED, PoolId

#: The most queries of each KV head by which errors are judged.
MAX_ERROR_QUERIES = 64


class LayerEncoders:
    """The encoders of a layer's keys and values, with the newest queries, by which errors are judged.

    Parameters
    ----------
    plain : PlainPool
        The pool that full pages come from, for shapes and dtype.
    config : PiKVConfig
        Codecs and error budget.
    uncoded_too : bool
        Whether pages that no codec takes leave the plain pool too.

    Attributes
    ----------
    queries : torch.Tensor or None
        `(H, m, D)`, the last queries that attended.
    query_scale : float
        Factor on their logits.
    """

    def __init__(self, plain: PlainPool, config: PiKVConfig, uncoded_too: bool) -> None:
        self.queries: torch.Tensor | None = None
        self.query_scale = 1.0
        self._config, self._uncoded_too = config, uncoded_too
        self._heads, _, _, dim = plain.keys.shape
        self._dims = dim, plain.values.shape[-1]
        self._element_size = plain.keys.element_size()
        self._encoders = _encoders(config.key_codec, config.value_codec, config)

    @property
    def packs(self) -> bool:
        """Whether full pages leave the plain pool."""
        return self._uncoded_too or PoolId(self._config.key_codec, self._config.value_codec) != UNCODED

    @property
    def in_use(self) -> tuple[PageEncoder, ...]:
        """The encoders of keys and of values, none where full pages stay in the plain pool."""
        return self._encoders if self.packs else ()

    def remember_queries(self, queries: torch.Tensor, scale: float) -> None:
        """Remember queries `(H, m, D)` to judge errors by."""
        self.queries, self.query_scale = queries, scale

    # Bases of low-rank codecs

    def bases(self, which: KV) -> list[torch.Tensor]:
        """Return what the codecs of keys, or of values, keep beside the pages."""
        known = [codec for encoder in self.in_use if encoder.which is which for codec in encoder.codecs.values()]
        return [codec.basis for codec in known if codec.basis is not None]

    def set_bases(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Give low-rank codecs their bases `(H, D, rank)` instead of having them fitted."""
        for encoder, basis, dim in zip(self.in_use, (keys, values), self._dims, strict=False):
            codec = encoder.codec(encoder.rungs[0], dim)
            if codec.is_lowrank and basis is not None:
                codec.basis = basis

    def inherit_bases(self, other: "LayerEncoders") -> None:
        """Go on with the bases that the encoders of another table of these heads have fitted."""
        for mine, theirs in zip(self.in_use, other.in_use, strict=False):
            mine.codecs.update({name: codec for name, codec in theirs.codecs.items() if codec.basis is not None})

    def forget(self, key_codec: Codec, value_codec: Codec) -> None:
        """Forget codecs, with their bases, that were fitted to tokens that are gone."""
        for encoder, codec in zip(self.in_use, (key_codec, value_codec), strict=False):
            if encoder.codecs.get(codec.name) is codec:
                del encoder.codecs[codec.name]

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that are kept beside the pages."""
        return [*self.bases(KV.KEYS), *self.bases(KV.VALUES), *([] if self.queries is None else [self.queries])]

    @property
    def most_bytes(self) -> int:
        """The most bytes that :meth:`tensors` may take: of queries, and of bases of low-rank codecs."""
        if not self.packs:
            return 0
        most = self._heads * MAX_ERROR_QUERIES * self._dims[0] * self._element_size
        for encoder, dim in zip(self._encoders, self._dims, strict=True):
            most += self._heads * dim * min(dim, encoder.codec(encoder.rungs[0], dim).rank) * self._element_size
        return most

    # Encoding

    def is_ready(self, tokens: int) -> bool:
        """Return whether full pages of so many tokens could be packed now."""
        return self.packs and all(
            encoder.is_ready(tokens, dim) for encoder, dim in zip(self._encoders, self._dims, strict=True)
        )

    @property
    def only_codecs(self) -> tuple[Codec, Codec] | None:
        """The codecs of keys and values that most pages will take, where that is known before."""
        if not self.packs or any(encoder.name == "auto" for encoder in self._encoders):
            return None
        keys, values = (e.codec(e.rungs[0], dim) for e, dim in zip(self._encoders, self._dims, strict=True))
        return keys, values

    def encode(self, pages: PageContents, codec: str | None = None) -> "list[EncodedPages]":
        """Encode full pages, each with the configured codecs or all with `codec`, whatever its error.

        Pages that no codec holds well enough are in none of the results, unless they leave the plain pool too.
        """
        guarded = codec is None
        keys_with, values_with = self._encoders if codec is None else _encoders(codec, codec, self._config)
        keys = keys_with.encode(pages.keys, self.queries, self.query_scale, guarded)
        values = values_with.encode(pages.values, None, 1.0, guarded)
        pairs = [EncodedPages.common(k, v) for k in keys for v in values]
        every = self._uncoded_too or not guarded
        return [pair for pair in pairs if len(pair.which) and (every or pair.pool_id != UNCODED)]


class EncodedPages(NamedTuple):
    """Pages whose keys went to one codec and whose values went to one codec.

    Attributes
    ----------
    which : numpy.ndarray
        `(n,)` int64, the pages, as numbers within what was to be encoded.
    keys, values : Encoded
        What the codecs made, of these pages among others.
    in_keys, in_values : numpy.ndarray
        `(n,)` int64, where the pages are in them.
    """

    which: np.ndarray
    keys: Encoded
    values: Encoded
    in_keys: np.ndarray
    in_values: np.ndarray

    @classmethod
    def common(cls, keys: Encoded, values: Encoded) -> "EncodedPages":
        """Return the pages that both have taken."""
        which, in_keys, in_values = np.intersect1d(keys.which, values.which, return_indices=True)
        return cls(which, keys, values, in_keys, in_values)

    @property
    def pool_id(self) -> PoolId:
        """The pool that the pages go to."""
        return PoolId(self.keys.codec.name, self.values.codec.name)

    def codes(self, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
        """Return the parts of the codes of keys and of values, and the errors, as :meth:`PackedPool.put` takes them."""
        keys, values = self.keys.errors, self.values.errors
        k, v = self.in_keys, self.in_values
        errors = np.stack([keys.energy[k], keys.lost[k], values.energy[v], values.lost[v], keys.logits[k]], axis=1)
        picked = [
            part.codes.pick(torch.from_numpy(index).to(device)).tensors()
            for part, index in ((self.keys, k), (self.values, v))
        ]
        return picked[0], picked[1], errors


def _encoders(key_codec: str, value_codec: str, config: PiKVConfig) -> tuple[PageEncoder, PageEncoder]:
    return PageEncoder(key_codec, KV.KEYS, config), PageEncoder(value_codec, KV.VALUES, config)
