"""Attention to pages by their numbers in one kernel launch, and the reader that belongs to a pool."""

import torch

from ..kernels import merge_pair
from ..kernels.paged_decode_attention import paged_decode_attention
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..tiers.tiered_pool import TieredPool
from .attention_call import AttentionCall, Partial
from .pool_readers import LocatedPages, PackedReader, PlainReader, PoolReader
from .tiered_reader import TieredReader


def reader_of(pool: PagePool) -> PoolReader:
    """Return the reader of a pool."""
    if isinstance(pool, PlainPool):
        return PlainReader(pool)
    if isinstance(pool, TieredPool):
        return TieredReader(pool)
    assert isinstance(pool, PackedPool)
    return PackedReader(pool)


def look_up(
    reader: PoolReader,
    query: torch.Tensor,
    entries: torch.Tensor,
    lengths: torch.Tensor,
    call: AttentionCall,
    page_lse: torch.Tensor | None,
) -> Partial:
    """Attend with one query per row to whole rows of a pool, as many pages at a time as are at hand.

    Parameters
    ----------
    reader : PoolReader
        Of the pool.
    query : torch.Tensor
        `(B, Hq, D')`, see :meth:`PoolReader.query`.
    entries, lengths : torch.Tensor
        `(B, n)` int32 page numbers, of which `lengths` `(B,)` int32 count.
    call : AttentionCall
        Scale, soft cap and whether tokens are latents.
    page_lse : torch.Tensor, optional
        `(B, Hq, n)` float32, written to.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, D')` and `(B, Hq)`, float32.
    """
    columns, step = entries.shape[1], reader.pages_at_hand(entries)
    result: Partial | None = None
    for start in range(0, columns, step):
        located = reader.located(entries[:, start : start + step], stay=False)
        written = None if page_lse is None else page_lse[:, :, start : start + step]
        partial = attend_located(query, located, (lengths - start).clamp(0, step), call, written)
        result = partial if result is None else merge_pair(*result, *partial)
    assert result is not None
    return result


def attend_located(
    query: torch.Tensor,
    located: LocatedPages,
    lengths: torch.Tensor,
    call: AttentionCall,
    page_lse: torch.Tensor | None,
) -> Partial:
    """Attend in one launch with queries `(B, Hq, D')` to the first `lengths` `(B,)` int32 located pages of each row."""
    out, lse, *of_pages = paged_decode_attention(
        query,
        located.keys,
        located.values,
        located.numbers.int(),
        lengths,
        located.counts,
        call.scale,
        call.softcap,
        page_lse=page_lse is not None,
        absorbed=call.absorbed,
    )
    if page_lse is not None:
        page_lse.copy_(of_pages[0])
    return out, lse
