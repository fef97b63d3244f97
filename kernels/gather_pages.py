"""Collecting pages that do not lie side by side."""

import torch


def gather_dense(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Copy the pages of each row of a page table next to one another.

    Parameters
    ----------
    pages : torch.Tensor
        `(H, N, P, D)`, the pool.
    table : torch.Tensor
        `(B, n)` int64 page numbers, all within `0..N-1`.

    Returns
    -------
    torch.Tensor
        `(H, B, n * P, D)`, contiguous.
    """
    heads, _, size, dim = pages.shape
    batch, count = table.shape
    return pages.index_select(1, table.reshape(-1)).view(heads, batch, count * size, dim)
