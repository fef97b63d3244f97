"""Collecting pages that do not lie side by side."""

import torch

from .decode_pages import decode_pages
from .dispatch import choose, run
from .page_codes import PageCodes, coded_dims


def gather_pages(
    pages: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Decode the pages of each row of a page table next to one another.

    Parameters
    ----------
    pages : PageCodes
        The pool: N pages of P tokens of H heads.
    table : torch.Tensor
        `(B, n)` int32 page numbers.
    lengths : torch.Tensor
        `(B,)` int32, entries of the table in use per row. Those beyond are never read, whatever they hold.
    counts : torch.Tensor
        `(N,)` int32, tokens in each page, 0..P.
    dtype : torch.dtype
        Of the result; the arithmetic is in float32.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    torch.Tensor
        `(B, H, n * P, D + L)`, 0 in slots that hold no token.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    batch, columns = table.shape
    if lengths.shape != (batch,) or counts.shape != (pages.pages,):
        raise ValueError(
            f"lengths {tuple(lengths.shape)} and counts {tuple(counts.shape)} for {batch} rows and {pages.pages} pages"
        )
    device = pages.codes.device
    how = choose(device, backend, coded_dims(pages))
    if how != "torch":
        gathered: torch.Tensor = run("gather_pages", how, device, pages, table, lengths, counts, dtype)
        return gathered
    size = pages.page_size
    out = torch.zeros((batch, pages.heads, columns * size, pages.width), dtype=dtype, device=device)
    slots = torch.arange(size, device=out.device)
    for row, length in enumerate(lengths.tolist()):
        used = table[row, :length].long()
        empty = slots >= counts[used].unsqueeze(1)
        tokens = decode_pages(pages.pick(used), dtype).masked_fill(empty[..., None], 0)
        out[row, :, : length * size] = tokens.flatten(1, 2)
    return out


def gather_dense(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Copy the pages of each row of a page table next to one another, as they are.

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
