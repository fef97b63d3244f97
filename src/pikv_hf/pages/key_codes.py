"""The keys of a page once more, in 2 bits: from them routing estimates what attention a page would take."""

import copy
from typing import Self

import numpy as np
import torch

from ..common.kv import KV
from ..common.tensors import resized
from ..kernels import encode_pages
from ..kernels.page_codes import PageCodes, empty_codes
from .key_bounds import BOUNDS_BLOCK_BYTES, BoundedPages, stored_keys
from .types import PageIds


class KeyCodes:
    """The keys of a pool's pages as int2 codes, made when first asked for, beside whatever form they are stored in.

    Codes of what a pool decodes its keys to: a page has the same wherever it lies and however it got there.

    Parameters
    ----------
    heads, page_size, dim : int
        Of the keys.
    device : torch.device
        Where attention runs.
    parts : tuple of KV
        What the channels of the keys are stored as, see :class:`~pikv_hf.pages.key_bounds.KeyBounds`.

    Attributes
    ----------
    codes : PageCodes
        N pages.
    known : numpy.ndarray
        `(N,)` bool, the pages whose codes have been made.
    """

    def __init__(
        self, heads: int, page_size: int, dim: int, device: torch.device, parts: tuple[KV, ...] = (KV.KEYS,)
    ) -> None:
        self.parts = parts
        self.codes = empty_codes("int2", heads, page_size, dim, torch.float32, device, keys=True)
        self.known = np.zeros(0, dtype=np.bool_)

    def find(self, pages: BoundedPages, ids: PageIds) -> PageCodes:
        """Return the codes of all pages, made where unknown for those at `ids` `(n,)`."""
        missing = np.unique(ids[~self.known[ids]])
        step = max(1, BOUNDS_BLOCK_BYTES // max(1, pages.page_bytes))
        for start in range(0, len(missing), step):
            block = missing[start : start + step]
            index = pages.index(block)
            keys, empty = stored_keys(pages, index, self.parts)
            # A slot without a token repeats the first, which leaves the ranges of the others as they are.
            made = encode_pages(keys.where(~empty, keys[:, :, :1]), "int2", keys=True)
            for stored, new in zip(self.codes.tensors(), made.tensors(), strict=True):
                stored.index_copy_(1, index, new)
            self.known[block] = True
        return self.codes

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return self.codes.tensors()

    @property
    def host_bytes(self) -> int:
        """Bytes kept outside of tensors."""
        return self.known.nbytes

    def resized(self, pages: int, kept: PageIds, index: torch.Tensor | int) -> Self:
        """Return the codes of a pool of so many pages, of which the first are those `kept` `(n,)`.

        `index` are the same numbers on the device, or n if these are `0..n-1`.
        """
        new = copy.copy(self)
        new.codes = self.codes.map(lambda tensor: resized(tensor, pages, 1, index))
        new.known = np.append(self.known[kept], np.zeros(pages - len(kept), dtype=np.bool_))
        return new

    def reset(self, ids: PageIds) -> None:
        """Forget the codes of pages that get other tokens."""
        self.known[ids] = False

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the codes of the page it is a copy of."""
        for tensor in self.codes.tensors():
            tensor[:, new] = tensor[:, page]
        self.known[new] = self.known[page]
