"""Lists of pages for the compiled CPU kernel: what it is told once for lists, and in each call."""

import struct
import threading

import numpy as np
import torch

from . import decode_layout as layout
from . import numba_decode_kernel as kernel
from .page_codes import BITS, PageCodes
from .page_lists import FLOATS, LANES, ListedPool, PageLists
from .thread_team import run_in_team, team_size

# Pages of a head that are worth a thread of their own, and the parts of a list, at least, that a thread may take: one
# that others keep from working does not keep them waiting for long.
_PAGES_PER_THREAD, _PARTS_PER_THREAD = 8, 4

# Of the memory that calls work in, each thread keeps no more.
_KEPT_BYTES = 4 * 1024 * 1024

# The fields of a call that are new in each, up to the two floats; what lists say comes behind them.
_NEW = struct.Struct(f"{layout.FLOATS}q2f")

_own = threading.local()


class ListReader:
    """Reads lists in threads of the CPU. See :class:`.page_lists.PageLists`."""

    def __init__(self, lists: PageLists) -> None:
        self._records = np.concatenate([_record(pool) for pool in lists.pools])
        self._strides = (1, lists.rows) if lists.by_head or lists.heads == 1 else (1, 0)
        # Pages of a head that are read: each list is, by one head or by all.
        self._pages = len(lists.entries) * (1 if lists.by_head else lists.heads)
        self._calls: dict[tuple[int, int], tuple[bytes, int, int, int, int]] = {}

    def attend(
        self,
        lists: PageLists,
        query: torch.Tensor,
        scale: float,
        softcap: float | None,
        page_lse: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend as :meth:`.PageLists.attend` does."""
        query = query.float().contiguous()
        shape = query.shape[:-1]
        out, lse = query.new_empty((*shape, lists.value_dim)), query.new_empty(shape)
        if not query.numel():
            return out, lse
        threads = team_size()
        group = query.numel() // (lists.rows * lists.heads * lists.query_dim)
        known = self._calls.get((group, threads))
        if known is None:
            known = self._calls[group, threads] = self._prepared(lists, group, threads)
        fields, function, used, part_bytes, scratch_bytes = known
        memory, address = _memory(8 * layout.CALL_FIELDS + part_bytes + used * scratch_bytes)
        first = address + 8 * layout.CALL_FIELDS
        of_pages = (0, 0) if page_lse is None else (page_lse.data_ptr(), page_lse.shape[-1])
        new = query.data_ptr(), out.data_ptr(), lse.data_ptr(), *of_pages, first, first + part_bytes
        _NEW.pack_into(memory, 0, 0, 0, 0, *new, scale, softcap or 0.0)
        memory[_NEW.size : 8 * layout.CALL_FIELDS] = fields
        run_in_team(function, address, used)
        return out, lse

    def _prepared(self, lists: PageLists, group: int, threads: int) -> tuple[bytes, int, int, int, int]:
        """Return the fields of a call, what to call in how many threads, and the bytes that parts and a thread take."""
        width = kernel.width_for(group)
        few, count = LANES // width, lists.rows * lists.heads
        # One or all: a team of another size than torch's would have to be made in every step, and torch's again.
        used = threads if self._pages >= 2 * _PAGES_PER_THREAD else 1
        splits = 1 if used == 1 else max(1, min(self._pages // count, -(-used * _PARTS_PER_THREAD // count)))
        fields = np.zeros(layout.CALL_FIELDS - layout.ROWS, dtype=np.int64)
        scratch_bytes = kernel.scratch_bytes(lists.query_dim, lists.value_dim, lists.page_size)
        known = (
            *(lists.rows, lists.heads, group, splits, count * splits),
            *(lists.entries.ctypes.data, lists.starts.ctypes.data, *self._strides),
            *(lists.query_dim, lists.value_dim, lists.page_size, self._records.ctypes.data, scratch_bytes),
        )
        fields[: len(known)] = known
        tasks = count * splits * -(-group // few)
        part_bytes = tasks * kernel.partial_bytes(width, lists.value_dim)
        return fields.tobytes(), kernel.compiled(width), used, part_bytes, scratch_bytes


def _memory(size: int) -> tuple[memoryview, int]:
    """Return uninitialised bytes that the next call on this thread may overwrite, and their address.

    They begin where a line of cache does.
    """
    kept: tuple[memoryview, int] | None = getattr(_own, "memory", None)
    if kept is None or kept[0].nbytes < size:
        memory = np.zeros(size + 64, dtype=np.uint8)
        memory = memory[-memory.ctypes.data % 64 :]
        kept = memory.data, memory.ctypes.data
        if size <= _KEPT_BYTES:
            _own.memory = kept
    return kept


def _record(pool: ListedPool) -> np.ndarray:
    """Return the fields of a pool as the kernel reads them."""
    fields = np.zeros(layout.POOL_FIELDS, dtype=np.int64)
    for start, part in ((0, pool.keys), (layout.PART_FIELDS, pool.values)):
        _describe(fields[start : start + layout.PART_FIELDS], part)
    fields[layout.COUNTS] = pool.counts.ctypes.data
    return fields


def _describe(fields: np.ndarray, part: PageCodes) -> None:
    fields[layout.DIM], fields[layout.BITS] = part.dim, BITS.get(part.kind, 0)
    if part.kind == "none":
        fields[layout.KIND] = FLOATS[part.codes.dtype]
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
        fields[layout.LATENT_KIND], fields[layout.LATENT_DIM] = FLOATS[part.latent.dtype], part.latent.shape[-1]
