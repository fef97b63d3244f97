"""Lists of pages as the kernel that reads them on a GPU has them in memory."""

import dataclasses

import numpy as np
import torch

from .page_codes import PageCodes
from .page_lists import ListedPool, PageLists
from .triton_listed_kernel import FIELDS, FIRST_PART, FORMAT, KEY_PAGES, KEYS, LAST_PART, VALUE_PAGES, VALUES
from .triton_pool import pool_operands

# Of an entry: where the page's tokens begin, and whether it grows.
_TOKENS, _GROWS = 32, 48


@dataclasses.dataclass(frozen=True, slots=True)
class SortedLists:
    """Lists with the pages of each pool beside each other.

    Attributes
    ----------
    pools : list of ListedPool
        K pools, in an order that depends on their formats alone: the kernel is compiled for it.
    pages, pool_of : numpy.ndarray
        `(n,)` int64 page numbers, list after list, and of each list pool after pool, and which pool each is of.
    starts : numpy.ndarray
        `(L * K + 1,)` int64, where those of each list and pool begin, and the end.
    longest : numpy.ndarray
        `(K,)` int64, the most pages of each pool that a list has.
    """

    pools: list[ListedPool]
    pages: np.ndarray
    pool_of: np.ndarray
    starts: np.ndarray
    longest: np.ndarray

    @classmethod
    def of(cls, lists: PageLists) -> "SortedLists":
        """Sort lists; the order of the pages of a list and pool stays."""
        order = sorted(range(len(lists.pools)), key=lambda number: _format(lists.pools[number]))
        place, count = np.argsort(order), len(order)
        given = lists.entries >= 0
        of_list = np.repeat(np.arange(len(lists.starts) - 1), np.diff(lists.starts))[given]
        entries = lists.entries[given]
        segment = of_list * count + place[entries >> 32]
        sorting = np.argsort(segment, kind="stable")
        lengths = np.bincount(segment, minlength=(len(lists.starts) - 1) * count)
        return cls(
            [lists.pools[number] for number in order],
            (entries & 0xFFFFFFFF)[sorting],
            (segment % count)[sorting],
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            lengths.reshape(-1, count).max(axis=0, initial=0),
        )


def _format(pool: ListedPool) -> tuple[int | str, ...]:
    keys, values = pool.keys, pool.values
    return keys.dim, keys.width, values.dim, values.width, keys.kind, values.kind


def uploaded(lists: SortedLists, parts: list[int], formats: list[int]) -> tuple[torch.Tensor, bool]:
    """Return what the kernel reads of lists, int64 on the device of the pools, and whether tensors begin at 16 bytes.

    `parts` says in how many parts the lists of each pool are read, `formats` which of its launch's formats it has.
    """
    records = np.zeros((len(lists.pools), FIELDS), dtype=np.int64)
    entries = lists.pages.copy()
    for number, (pool, record) in enumerate(zip(lists.pools, records, strict=True)):
        record[KEYS:VALUES], record[KEY_PAGES] = _addresses(pool.keys, torch.float16)
        record[VALUES:KEY_PAGES], record[VALUE_PAGES] = _addresses(pool.values, torch.int8)
        own = lists.pool_of == number
        pages = lists.pages[own]
        grows = np.zeros(len(pool.counts), dtype=np.int64)
        grows[pool.growing] = 1
        entries[own] |= grows[pages] << _GROWS | pool.counts[pages].astype(np.int64) << _TOKENS
    ends = np.cumsum(parts)
    records[:, FIRST_PART], records[:, LAST_PART], records[:, FORMAT] = ends - parts, ends, formats
    of_parts = np.repeat(np.arange(len(parts)), parts)
    everything = torch.from_numpy(np.concatenate([records.ravel(), of_parts, lists.starts, entries]))
    return everything.to(lists.pools[0].keys.codes.device), not (records[:, :KEY_PAGES] % 16).any()


def _addresses(part: PageCodes, floor_dtype: torch.dtype) -> tuple[list[int], int]:
    """Return where each tensor begins, 0 for none, and the pages from one head to the next."""
    operands = pool_operands(part, floor_dtype)
    return [0 if each is None else each.data_ptr() for each in operands.tensors], operands.pages
