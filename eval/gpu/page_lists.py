"""Attention to lists of pages of several pools in one launch, as a cache's decoding step has it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pikv_hf.eval.gpu.references import PageTable
from pikv_hf.kernels import merge_partials, paged_decode_attention
from pikv_hf.kernels.dispatch import choose
from pikv_hf.kernels.page_codes import PageCodes
from pikv_hf.kernels.page_lists import ListedPool, PageLists

#: Called with a query `(B, Hq, D)`, a scale, and what caps logits.
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class TablePool:
    """A pool of pages, and those that each row reads of it."""

    keys: PageCodes
    values: PageCodes
    page_table: PageTable

    def to(self, device: torch.device) -> "TablePool":
        """Return the pool on a device."""
        keys, values = (part.map(lambda tensor: tensor.to(device)) for part in (self.keys, self.values))
        return TablePool(keys, values, self.page_table.to(device))


def lists_of(pools: Sequence[TablePool], backend: str) -> PageLists:
    """Return the lists of all rows, row after row and of each row pool after pool."""
    rows, entries, listed = [], [], []
    for number, pool in enumerate(pools):
        table, lengths, counts = (
            part.cpu().numpy() for part in (pool.page_table.entries, pool.page_table.lengths, pool.page_table.counts)
        )
        used = np.arange(table.shape[1]) < lengths[:, None]
        rows.append(np.nonzero(used)[0])
        entries.append(table[used].astype(np.int64) | number << 32)
        listed.append(ListedPool(pool.keys, pool.values, counts.astype(np.int16)))
    row, entry, batch = np.concatenate(rows), np.concatenate(entries), len(pools[0].page_table.lengths)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=batch))])
    how = choose(pools[0].keys.codes.device, backend)
    return PageLists(listed, entry[np.argsort(row, kind="stable")], starts, batch, how)


def one_by_one(
    pools: Sequence[TablePool], query: torch.Tensor, scale: float, softcap: float | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to each pool alone, and merge: `(B, Hq, Dv)` and `(B, Hq)`."""
    parts = [
        paged_decode_attention(
            *(query, pool.keys, pool.values),
            *(pool.page_table.entries, pool.page_table.lengths, pool.page_table.counts),
            *(scale, softcap),
            backend=backend,
        )
        for pool in pools
    ]
    outs, lses = (torch.stack([part[result] for part in parts]) for result in (0, 1))
    return merge_partials(outs, lses, backend=backend)


def all_at_once(pools: Sequence[TablePool], backend: str) -> Attend:
    """Return what attends to the lists of all pools; torch, which has no such operation, to one after the other."""
    if backend == "torch":
        return lambda query, scale, softcap=None: one_by_one(pools, query, scale, softcap, backend)
    return lists_of(pools, backend).attend
