"""Attention of a decoding step over lists of pages: one call for pages of all formats, compiled for CPUs."""

import dataclasses
import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from . import decode_layout as layout
from .dispatch import load
from .page_codes import BITS, PageCodes
from .thread_team import run_in_team, team_size

_LANES = 16
_FLOATS = {torch.float32: layout.FLOAT32, torch.bfloat16: layout.BFLOAT16, torch.float16: layout.FLOAT16}

# Pages of a head that are worth a thread of their own, and the parts of a list, at least, that a thread may take: one
# that others keep from working does not keep them waiting for long.
_PAGES_PER_THREAD, _PARTS_PER_THREAD = 8, 4

_own = threading.local()


@dataclasses.dataclass(frozen=True, slots=True)
class ListedPool:
    """A pool of pages that lists refer to.

    Attributes
    ----------
    keys, values : PageCodes
        N pages of P tokens on the CPU.
    counts : numpy.ndarray
        `(N,)` int16, tokens in each page, 0..P. Read in every call.
    """

    keys: PageCodes
    values: PageCodes
    counts: np.ndarray

    def record(self) -> np.ndarray:
        """Return its fields as the kernel reads them."""
        fields = np.zeros(layout.POOL_FIELDS, dtype=np.int64)
        for start, part in ((0, self.keys), (layout.PART_FIELDS, self.values)):
            _describe(fields[start : start + layout.PART_FIELDS], part)
        fields[layout.COUNTS] = self.counts.ctypes.data
        return fields


def is_listable(*parts: PageCodes) -> bool:
    """Return whether the compiled kernel reads such pages: on a CPU, at most 32 bits a number, channels in sixteens."""
    return all(_is_listable(part) for part in parts)


def _is_listable(part: PageCodes) -> bool:
    if part.codes.device.type != "cpu":
        return False
    as_they_are = [part.codes] if part.kind == "none" else []
    if part.latent is not None:
        as_they_are.append(part.latent)
    if any(tensor.dtype not in _FLOATS for tensor in as_they_are):
        return False
    # Of a head and a page all lies together.
    together = all(not each.numel() or each[0, 0].is_contiguous() for each in part.tensors())
    return together and all(dim % _LANES == 0 for dim in (part.dim, part.width))


def _describe(fields: np.ndarray, part: PageCodes) -> None:
    fields[layout.DIM], fields[layout.BITS] = part.dim, BITS.get(part.kind, 0)
    if part.kind == "none":
        fields[layout.KIND] = _FLOATS[part.codes.dtype]
    else:
        fields[layout.KIND] = layout.FP8 if part.kind == "fp8" else layout.INTEGERS
    places = (layout.CODES, layout.SPREAD, layout.FLOOR, layout.OUTLIERS, layout.FINE, layout.LATENT)
    tensors = (part.codes, part.spread, part.floor, part.outliers, part.fine, part.latent)
    for place, tensor in zip(places, tensors, strict=True):
        if tensor is not None:
            size = tensor.element_size()
            fields[place : place + 3] = tensor.data_ptr(), size * tensor.stride(0), size * tensor.stride(1)
    if part.floor is not None:
        fields[layout.FLOOR_IS_INT8] = part.floor.dtype == torch.int8
    if part.latent is not None:
        fields[layout.LATENT_KIND], fields[layout.LATENT_DIM] = _FLOATS[part.latent.dtype], part.latent.shape[-1]


class PageLists:
    """Lists of pages, one for each row, or for each KV head of each row.

    Parameters
    ----------
    pools : sequence of ListedPool
        Of equal heads and page sizes, and equal widths of keys and of values; their tensors must stay where they are.
    entries : numpy.ndarray
        `(n,)` int64, all lists one after the other: `pool << 32 | page`; below 0 for none.
    starts : numpy.ndarray
        `(L + 1,)` int64, where each list begins, and the end.
    rows : int
        L, or `L / H` where each KV head has a list: that of head h of row r is `h * rows + r`.
    """

    def __init__(self, pools: Sequence[ListedPool], entries: np.ndarray, starts: np.ndarray, rows: int) -> None:
        self.pools, self.rows, self.heads = pools, rows, pools[0].keys.heads
        self.query_dim, self.value_dim = pools[0].keys.width, pools[0].values.width
        self._entries, self._starts = entries, starts
        self._records = np.concatenate([pool.record() for pool in pools])
        by_head = len(starts) - 1 > rows or self.heads == 1
        self._strides = (1, rows) if by_head else (1, 0)
        # Pages of a head that are read: each list is, by one head or by all.
        self._pages = len(entries) * (1 if by_head else self.heads)
        self._calls: dict[tuple[int, int], tuple[np.ndarray, int, int, int, int]] = {}

    def attend(
        self, query: torch.Tensor, scale: float, softcap: float | None = None, page_lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with one query per query head and row to all tokens of the pages of its list.

        Parameters
        ----------
        query : torch.Tensor
            `(..., D)` floating point, of row after row: `H * G` query heads, those of a KV head beside each other.
        scale, softcap
            Factor on the logits, and what caps them.
        page_lse : torch.Tensor, optional
            `(rows, H * G, n)` float32, written to: the log-sum-exp of each page of the list; pages without tokens and
            entries that there are not keep what was there.

        Returns
        -------
        tuple of torch.Tensor
            `(..., Dv)` and the LSE `(...)`, float32; 0 and -inf where a list holds no token.
        """
        query = query.float().contiguous()
        shape = query.shape[:-1]
        out, lse = query.new_empty((*shape, self.value_dim)), query.new_empty(shape)
        if not query.numel():
            return out, lse
        threads = team_size()
        group = query.numel() // (self.rows * self.heads * self.query_dim)
        known = self._calls.get((group, threads))
        if known is None:
            known = self._calls[group, threads] = self._prepared(group, threads)
        fields, function, used, part_bytes, scratch_bytes = known
        memory = _memory(part_bytes + used * scratch_bytes + 8 * layout.CALL_FIELDS)
        call = memory[: 8 * layout.CALL_FIELDS].view(np.int64)
        call[:] = fields
        address = call.ctypes.data
        first = address + 8 * layout.CALL_FIELDS
        floats = np.array((scale, softcap or 0.0), dtype=np.float32)
        of_pages = (0, 0) if page_lse is None else (page_lse.data_ptr(), page_lse.shape[-1])
        call[layout.QUERY : layout.FLOATS + 1] = (
            *(query.data_ptr(), out.data_ptr(), lse.data_ptr(), *of_pages),
            *(first, first + part_bytes, floats.ctypes.data),
        )
        run_in_team(function, address, used)
        return out, lse

    def _prepared(self, group: int, threads: int) -> tuple[np.ndarray, int, int, int, int]:
        """Return the fields of a call, what to call in how many threads, and the bytes that parts and a thread take."""
        kernel: ModuleType = load("decode_kernel", "numba")
        width = kernel.width_for(group)
        few, lists = _LANES // width, self.rows * self.heads
        used = max(1, min(threads, self._pages // _PAGES_PER_THREAD))
        splits = 1 if used == 1 else max(1, min(self._pages // lists, -(-used * _PARTS_PER_THREAD // lists)))
        fields = np.zeros(layout.CALL_FIELDS, dtype=np.int64)
        fields[layout.ROWS : layout.CALL_FIELDS] = (
            *(self.rows, self.heads, group, splits, lists * splits),
            *(self._entries.ctypes.data, self._starts.ctypes.data, *self._strides),
            *(self.query_dim, self.value_dim, self.pools[0].keys.page_size, self._records.ctypes.data),
            scratch_bytes := kernel.scratch_bytes(self.query_dim, self.value_dim),
        )
        tasks = lists * splits * -(-group // few)
        part_bytes = tasks * kernel.partial_bytes(width, self.value_dim)
        return fields, kernel.compiled(width), used, part_bytes, scratch_bytes


def _memory(size: int) -> np.ndarray:
    """Return uninitialised bytes that the next call on this thread may overwrite, from where a line of cache begins."""
    memory: np.ndarray | None = getattr(_own, "memory", None)
    if memory is None or len(memory) < size:
        memory = np.zeros(size + 64, dtype=np.uint8)
        memory = _own.memory = memory[-memory.ctypes.data % 64 :]
    return memory
