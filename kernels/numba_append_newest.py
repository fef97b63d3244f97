"""Compiled CPU versions of what :mod:`.append_newest` makes: a call for all rows' tokens, and one for their experts.

Each operation of torch costs more than the few numbers that it copies, and of several rows it takes a dozen.
"""

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from .numba_compiler import address_of, sources
from .numba_vectors import copy_bytes, read_int64, write_int16, write_int32

# What a writer knows, as 64-bit integers: rows, KV heads, the positions, and where slots are.
_ROWS, _HEADS, _POSITIONS, _SLOTS = range(4)
# Of the keys, and then of the values: the pages, the bytes from one head of them to the next, and those of a token.
_PAGES, _PAGES_HEAD, _TOKEN_BYTES = (4, 7), (5, 8), (6, 9)
# What is new in each step: how far behind, the position, and tokens with the bytes from one row, or head, to the next.
_OFFSET, _POSITION, _TOKENS, _TOKENS_ROW, _TOKENS_HEAD = 10, 11, (12, 15), (13, 16), (14, 17)
_KNOWN, _NEW = struct.Struct("10q"), struct.Struct("8q")


def _tokens_entry(sources: int) -> Callable[[int], None]:
    def append(call):  # type: ignore[no-untyped-def]
        rows = read_int64(call + 8 * _ROWS) if sources else 0
        for row in range(rows):
            slot = read_int64(read_int64(call + 8 * _SLOTS) + 8 * row) + read_int64(call + 8 * _OFFSET)
            write_int32(read_int64(call + 8 * _POSITIONS) + 4 * slot, read_int64(call + 8 * _POSITION))
            for part in range(2):
                size = read_int64(call + 8 * _TOKEN_BYTES[part])
                page = read_int64(call + 8 * _PAGES[part]) + slot * size
                token = read_int64(call + 8 * _TOKENS[part]) + row * read_int64(call + 8 * _TOKENS_ROW[part])
                for _ in range(read_int64(call + 8 * _HEADS)):
                    copy_bytes(page, token, size)
                    page += read_int64(call + 8 * _PAGES_HEAD[part])
                    token += read_int64(call + 8 * _TOKENS_HEAD[part])

    return append


def _experts_entry(sources: int) -> Callable[[int], None]:
    def note(call):  # type: ignore[no-untyped-def]
        rows = read_int64(call) if sources else 0
        experts, slots, lanes = read_int64(call + 8), read_int64(call + 16), read_int64(call + 24)
        behind, chosen, stride = read_int64(call + 32), read_int64(call + 40), read_int64(call + 48)
        for row in range(rows):
            slot = read_int64(slots + 8 * row) + behind
            write_int16(experts + 2 * slot, read_int64(chosen + row // lanes * stride))

    return note


@functools.cache
def _compiled(entry: Callable[[int], Callable[[int], None]]) -> Callable[[bytes], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address_of(entry(sources())))


class Writer:
    """Writes to slots of rows; see :func:`.append_newest.newest_writer`."""

    def __init__(
        self, key_pages: torch.Tensor, value_pages: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        # They stay where they are as long as this refers to them.
        self._pool = key_pages, value_pages, positions, slots
        self._size, self._call = key_pages.element_size(), _compiled(_tokens_entry)
        known = [len(slots), key_pages.shape[0], positions.data_ptr(), slots.data_ptr()]
        for pages in (key_pages, value_pages):
            known += pages.data_ptr(), self._size * pages.stride(0), self._size * pages.shape[3]
        self._known = _KNOWN.pack(*known)

    def __call__(self, offset: int, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Write a token per row."""
        if keys.stride(3) != 1 or values.stride(3) != 1:
            keys, values = keys.contiguous(), values.contiguous()
        size, (row, head, _, _), (value_row, value_head, _, _) = self._size, keys.stride(), values.stride()
        new = keys.data_ptr(), size * row, size * head, values.data_ptr(), size * value_row, size * value_head
        self._call(self._known + _NEW.pack(offset, position, *new))


class ExpertWriter:
    """Notes experts in slots of rows; see :func:`.append_newest.expert_writer`."""

    _fields = struct.Struct("7q")

    def __init__(self, experts: torch.Tensor, slots: torch.Tensor) -> None:
        self._experts, self._slots, self._call = experts, slots, _compiled(_experts_entry)

    def __call__(self, offset: int, chosen: torch.Tensor) -> None:
        """Note the expert of each row's token, or of several rows' each."""
        if chosen.dtype != torch.int64:
            chosen = chosen.long()
        rows, told = len(self._slots), len(chosen)
        known = rows, self._experts.data_ptr(), self._slots.data_ptr(), rows // told
        self._call(self._fields.pack(*known, offset, chosen.data_ptr(), 8 * chosen.stride(0)))
