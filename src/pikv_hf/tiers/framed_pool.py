"""A pool of pages whose K/V lie in frames: entries of tensors that are fewer than the pages."""

import numpy as np
import torch

from ..codecs.codec import Codec
from ..kernels.page_codes import BITS, PageCodes
from ..pages.key_bounds import KeyBounds
from ..pages.packed_pool import PackedPool
from ..pages.page_storage import extended
from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds


class FramedPool(PackedPool):
    """Full pages, each in a frame or in none. A subclass moves them.

    Parameters
    ----------
    plain : PlainPool
        The layer's pool of pages as they came.
    key_codec, value_codec : Codec
        What the pages are encoded with.

    Attributes
    ----------
    keys, values : PageCodes
        F frames.
    frame : numpy.ndarray
        `(N,)` int64, the frame of each page, -1 where it has none.
    page_of : numpy.ndarray
        `(F,)` int64, the page in each frame, -1 where it is free.
    """

    in_place = False

    def __init__(self, plain: PlainPool, key_codec: Codec, value_codec: Codec) -> None:
        super().__init__(plain, key_codec, value_codec)
        self.frame = np.zeros(0, dtype=np.int64)
        self.page_of = np.zeros(0, dtype=np.int64)
        self._frame_map: torch.Tensor | None = None

    # Of a page as of any other pool's: all but its K/V

    def _page_tensors(self) -> list[torch.Tensor]:
        return []

    def _notes(self) -> list[str]:
        return [*super()._notes(), "frame"]

    def _grow(self, extra: int) -> None:
        super()._grow(extra)
        self.frame = np.append(self.frame, np.full(extra, -1, dtype=np.int64))
        self._frame_map = None

    @property
    def host_bytes(self) -> int:
        """Bytes of the bookkeeping kept outside of tensors."""
        return super().host_bytes + self.frame.nbytes + self.page_of.nbytes

    @property
    def free_bytes(self) -> int:
        """Bytes of K/V in memory that no page uses."""
        return self.free_frames * self.page_bytes

    def _new_bounds(self) -> KeyBounds:
        if self.keys.kind in BITS and self.keys.latent is None:
            return CodeBounds(self.keys.heads, self._key_dim, self.device)
        return super()._new_bounds()

    # Where pages are

    @property
    def frames_made(self) -> int:
        """F, the pages that the tensors have room for."""
        return len(self.page_of)

    @property
    def free_frames(self) -> int:
        """Frames without a page."""
        return int(np.count_nonzero(self.page_of < 0))

    def is_all_framed(self) -> bool:
        """Return whether every page in use has a frame."""
        return not bool(((self.frame < 0) & (self.refcount > 0)).any())

    def frame_map(self) -> torch.Tensor:
        """Return the frame of each page on the device, `(N,)` int64; any for those that have none."""
        if self._frame_map is None:
            self._frame_map = self.index(self.frame.clip(min=0))
        return self._frame_map

    def frame_counts(self) -> torch.Tensor:
        """Return the tokens in each frame, `(F,)` int32."""
        return self.counts_of(self.index(self.page_of.clip(min=0))).where(self.index(self.page_of) >= 0, 0)

    def counts_of(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tokens in the pages at `index` `(n,)`, `(n,)` int32."""
        return (self.positions.index_select(0, index) >= 0).sum(dim=1, dtype=torch.int32)

    def _assembled(
        self, ids: PageIds, loaded: tuple[PageIds, list[torch.Tensor]] | None
    ) -> tuple[PageCodes, PageCodes]:
        """Return copies of the codes of pages `(n,)`, which may repeat: from their frames, or from what is loaded.

        `loaded` are distinct pages without a frame and the parts of their codes `(H, m, ...)`. Pages that are in
        neither are zeros.
        """
        held = np.flatnonzero(self.frame[ids] >= 0)
        frames, places = self.index(self.frame[ids[held]]), self.index(held)
        parts = [part.new_zeros((part.shape[0], len(ids), *part.shape[2:])) for part in self.token_tensors()]
        for part, own in zip(parts, self.token_tensors(), strict=True):
            part.index_copy_(1, places, own.index_select(1, frames))
        if loaded is not None:
            source, target = _places(loaded[0], ids)
            for part, new in zip(parts, loaded[1], strict=True):
                picked = new if source is None else new.index_select(1, self.index(source))
                part.index_copy_(1, self.index(target), picked)
        rest = iter(parts)
        return self.keys.map(lambda _: next(rest)), self.values.map(lambda _: next(rest))

    # Frames

    def _occupy(self, ids: PageIds, frames: np.ndarray, parts: list[torch.Tensor]) -> None:
        """Write pages, given by the parts of their codes `(H, n, ...)`, into free frames `(n,)`."""
        index = self.index(frames)
        for held, new in zip(self.token_tensors(), parts, strict=True):
            held.index_copy_(1, index, new)
        self.frame[ids], self.page_of[frames] = frames, ids
        self._frame_map = None

    def _vacate(self, ids: PageIds) -> None:
        """Take pages out of the frames that they may have."""
        frames = self.frame[ids]
        self.page_of[frames[frames >= 0]] = -1
        self.frame[ids] = -1
        self._frame_map = None

    def _add_frames(self, extra: int) -> None:
        self._replace_tokens([extended(tensor, extra, 1) for tensor in self.token_tensors()])
        self.page_of = np.append(self.page_of, np.full(extra, -1, dtype=np.int64))

    def _set_frames(self, count: int) -> None:
        """Replace the tensors by ones of `count` frames, which the pages that are there fit into."""
        used = np.flatnonzero(self.page_of >= 0)
        pages, index = self.page_of[used], self.index(used)
        replaced = []
        for tensor in self.token_tensors():
            new = tensor.new_zeros((tensor.shape[0], count, *tensor.shape[2:]))
            new[:, : len(used)] = tensor.index_select(1, index)
            replaced.append(new)
        self._replace_tokens(replaced)
        self.page_of = np.append(pages, np.full(count - len(used), -1, dtype=np.int64))
        self.frame[pages] = np.arange(len(pages))
        self._frame_map = None


def _places(pages: PageIds, ids: PageIds) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which of distinct pages go where in `ids`; None instead of which if each goes to one place, in order."""
    order = np.argsort(pages)
    wanted = np.flatnonzero(np.isin(ids, pages))
    source = order[np.searchsorted(pages, ids[wanted], sorter=order)]
    if len(source) == len(pages):
        return None, wanted[np.argsort(source)]
    return source, wanted


class CodeBounds(KeyBounds):
    """The floors and spreads of packed keys, which stay where they can be read when their pages do not.

    They are what routing reads of a pool whose pages all have their place in memory, so that it chooses the same pages.

    Parameters
    ----------
    heads, dim : int
        Of the keys.
    device : torch.device
        Where attention runs.

    Attributes
    ----------
    ends, spreads : torch.Tensor
        `(H, N, D)` float16 floors and uint8 spreads.
    """

    def __init__(self, heads: int, dim: int, device: torch.device) -> None:
        super().__init__(heads, dim, torch.float16, device)
        self.ends = torch.zeros((heads, 0, dim), dtype=torch.float16, device=device)
        self.spreads = torch.zeros((heads, 0, dim), dtype=torch.uint8, device=device)

    @property
    def high(self) -> torch.Tensor:
        """`(H, N, D)` uint8."""
        return self.spreads

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self.ends, self.spreads]

    def resize(self, pages: int) -> None:
        """Follow the pool to another number of pages."""
        super().resize(pages)
        kept = min(pages, self.spreads.shape[1])
        spreads = self.spreads.new_zeros((self.spreads.shape[0], pages, self.dim))
        spreads[:, :kept] = self.spreads[:, :kept]
        self.spreads = spreads

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the bounds of the page it is a copy of."""
        super().copy(page, new)
        self.spreads[:, new] = self.spreads[:, page]

    def find(self, pool: PackedPool, ids: PageIds) -> None:  # type: ignore[override]
        """Read the codes of the pages among `ids` whose bounds are unknown."""
        missing = np.unique(ids[~self.known[ids]])
        for start in range(0, len(missing), step := pool.block_pages()):
            block = missing[start : start + step]
            index = pool.index(block)
            keys = pool.codes_at(index)[0]
            assert keys.floor is not None
            assert keys.spread is not None
            self.ends.index_copy_(1, index, keys.floor)
            self.spreads.index_copy_(1, index, keys.spread)
            self.known[block] = True
