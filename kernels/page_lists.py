"""Attention of a decoding step over lists of pages: one call for pages of all formats, on a CPU or a GPU."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from . import decode_layout as layout
from .dispatch import Backend, load
from .page_codes import PageCodes

#: Channels that the compiled CPU kernel takes at a time, and the types that it reads.
LANES = 16
FLOATS = {torch.float32: layout.FLOAT32, torch.bfloat16: layout.BFLOAT16, torch.float16: layout.FLOAT16}


@dataclasses.dataclass(frozen=True, slots=True)
class ListedPool:
    """A pool of pages that lists refer to.

    Attributes
    ----------
    keys, values : PageCodes
        N pages of P tokens.
    counts : numpy.ndarray
        `(N,)` int16, tokens in each page, 0..P.
    growing : numpy.ndarray
        `(n,)` int64, the pages whose counts may change while the lists last. Usually all change alike; where some do
        not, what a GPU knows of the lists is made anew.
    """

    keys: PageCodes
    values: PageCodes
    counts: np.ndarray
    growing: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def is_listable(*parts: PageCodes) -> bool:
    """Return whether the compiled kernel reads such pages: on a CPU, at most 32 bits a number, channels in sixteens."""
    return all(_is_listable(part) for part in parts)


def _is_listable(part: PageCodes) -> bool:
    if part.codes.device.type != "cpu":
        return False
    as_they_are = [part.codes] if part.kind == "none" else []
    if part.latent is not None:
        as_they_are.append(part.latent)
    if any(tensor.dtype not in FLOATS for tensor in as_they_are):
        return False
    # Of a head and a page all lies together.
    together = all(not each.numel() or each[0, 0].is_contiguous() for each in part.tensors())
    return together and all(dim % LANES == 0 for dim in (part.dim, part.width))


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
    how : str
        Which compiled version reads them, "numba", "triton" or "interpret"; see :func:`.dispatch.choose`.
    """

    def __init__(
        self, pools: Sequence[ListedPool], entries: np.ndarray, starts: np.ndarray, rows: int, how: Backend
    ) -> None:
        self.pools, self.entries, self.starts, self.rows = pools, entries, starts, rows
        self.heads, self.page_size = pools[0].keys.heads, pools[0].keys.page_size
        self.query_dim, self.value_dim = pools[0].keys.width, pools[0].values.width
        self.by_head = len(starts) - 1 > rows
        self._reader = load("page_lists", how).ListReader(self)

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
            `(rows, H * G, n)` float32, written to: the log-sum-exp of each page of lists of a single pool, -inf or what
            was there for a page without tokens. Where there is no page, what was there stays.

        Returns
        -------
        tuple of torch.Tensor
            `(..., Dv)` and the LSE `(...)`, float32; 0 and -inf where a list holds no token.
        """
        result: tuple[torch.Tensor, torch.Tensor] = self._reader.attend(self, query, scale, softcap, page_lse)
        return result
