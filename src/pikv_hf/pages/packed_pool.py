"""The pool of packed pages: full pages encoded by a codec for keys and one for values."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.kv import KV
from ..kernels import gather_pages
from ..kernels.page_codes import BITS, PageCodes
from .key_bounds import KeyBounds, beside_rotary
from .page_pool import PagePool
from .plain_pool import PlainPool
from .pool_id import PoolId
from .types import PageIds

#: The share by which these pools grow: single pages at a time in a long generation, and users look at their bytes.
PACKED_GROWTH = 1 / 64


class PackedPool(PagePool):
    """Full pages of one layer on one device, encoded once and immutable; cropping only lowers their counts.

    Parameters
    ----------
    plain : PlainPool
        The layer's pool of pages as they came, for shapes, dtype and device.
    key_codec, value_codec : Codec
        What the pages are encoded with.

    Attributes
    ----------
    keys, values : PageCodes
        N pages.
    errors : numpy.ndarray
        `(N, 5)` float32: energy and lost energy of keys, of values, and the mean square error of logits.
    """

    new_page: ClassVar[Mapping[str, np.ndarray | np.generic]] = {
        **PagePool.new_page,
        "errors": np.zeros(5, dtype=np.float32),
    }
    errors: np.ndarray

    def __init__(self, plain: PlainPool, key_codec: Codec, value_codec: Codec) -> None:
        super().__init__(plain.page_size, plain.device, PACKED_GROWTH, keeps_experts=False)
        heads, dtype = plain.keys.shape[0], plain.keys.dtype
        self.dtype = dtype
        self.key_dim, self.value_dim = plain.keys.shape[-1], plain.values.shape[-1]
        self.rotary_values = plain.rotary_values
        self.key_codec, self.value_codec = key_codec, value_codec
        size, device = plain.page_size, plain.device
        self.keys = key_codec.empty(heads, size, plain.keys.shape[-1], dtype, device)
        self.values = value_codec.empty(heads, size, plain.values.shape[-1], dtype, device)

    @property
    def id(self) -> PoolId:
        """Which pool of its layer it is."""
        return PoolId(self.key_codec.name, self.value_codec.name)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.id.name

    def token_tensors(self) -> list[torch.Tensor]:
        """Return all parts of the codes of keys, then of values."""
        return [*self.keys.tensors(), *self.values.tensors()]

    def _replace_tokens(self, tensors: list[torch.Tensor]) -> None:
        parts = iter(tensors)
        self.keys = self.keys.map(lambda _: next(parts))
        self.values = self.values.map(lambda _: next(parts))

    @property
    def _codes_have_bounds(self) -> bool:
        """Whether keys are integer codes, which are counted from the least value of their channel."""
        return self.keys.kind in BITS and self.keys.latent is None

    def _new_bounds(self) -> KeyBounds | None:
        if self._codes_have_bounds:
            return None
        return KeyBounds(*self.key_shape, self.dtype, self.device, self.key_parts)

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys, rotary parts included."""
        return self.keys.heads, self.key_dim + (self.value_dim if self.rotary_values else 0)

    def keep_bounds(self) -> None:
        """Have a place for the bounds of all pages from now on; see :meth:`PagePool.keep_bounds`."""
        super().keep_bounds()
        if self.rotary_values and self._codes_have_bounds and self.rotary_bounds is None:
            # What packing values does to their least and largest is not bounded by their codes.
            rotary = KeyBounds(self.keys.heads, self.value_dim, self.dtype, self.device, (KV.VALUES,))
            self.rotary_bounds = rotary.resized(self.capacity, np.arange(0), 0)

    def key_bounds(self, ids: PageIds) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the keys of all pages; see :meth:`PagePool.key_bounds`."""
        self.keep_bounds()
        low, high = bounds_of_codes(self.keys) if self.bounds is None else super().key_bounds(ids)
        if self.rotary_bounds is None:
            return low, high
        self.rotary_bounds.find(self, ids)
        return beside_rotary(low, high, self.rotary_bounds)

    def put(self, ids: PageIds, keys: list[torch.Tensor], values: list[torch.Tensor], errors: np.ndarray) -> None:
        """Store encoded pages.

        Parameters
        ----------
        ids : numpy.ndarray
            `(n,)` allocated pages.
        keys, values : list of torch.Tensor
            The parts of the codes of n pages, `(H, n, ...)` each.
        errors : numpy.ndarray
            `(n, 5)`.
        """
        index = self.index(ids)
        for stored, new in zip(self.token_tensors(), [*keys, *values], strict=True):
            stored.index_copy_(1, index, new)
        self.errors[ids] = errors

    def copy_page(self, page: int) -> int:
        """Copy a page; the copy has a reference count of 1."""
        new = super().copy_page(page)
        self.errors[new] = self.errors[page]
        return new

    def decoded(self, index: torch.Tensor, which: KV) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)`, decoded into `(H, n * P, D)`."""
        codes, codec = self._codes_of(which)
        return self._gathered(codes, codec, index, self.counts())

    def _codes_of(self, which: KV) -> tuple[PageCodes, Codec]:
        return (self.keys, self.key_codec) if which is KV.KEYS else (self.values, self.value_codec)

    def codes_at(self, index: torch.Tensor) -> tuple[PageCodes, PageCodes]:
        """Return copies of the codes of keys and of values of the pages at `index` `(n,)`."""
        return self.keys.pick(index), self.values.pick(index)

    def _gathered(self, codes: PageCodes, codec: Codec, index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        table, lengths = index[None].int(), torch.full((1,), len(index), dtype=torch.int32, device=self.device)
        dtype = self.dtype if codec.basis is None else torch.float32
        return codec.from_code_space(gather_pages(codes, table, lengths, counts, dtype)[0]).to(self.dtype)


def bounds_of_codes(keys: PageCodes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the floors and the spreads above them `(H, N, D)` that integer codes of keys are counted from."""
    assert keys.floor is not None
    assert keys.spread is not None
    return keys.floor, keys.spread
