"""What attention pages would take of a query, from their keys in few bits."""

import torch

from .dispatch import choose
from .page_codes import PageCodes, coded_dims
from .page_lists import LANES, is_listable
from .paged_decode_attention import paged_decode_attention


def page_masses(
    query: torch.Tensor,
    keys: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return the log-sum-exp of the logits of each page of each row: the kernel of a decode step, without values.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, D)` floating point, `Hq = H * G`.
    keys : PageCodes
        N pages of P tokens of H heads.
    table : torch.Tensor
        `(B, n)` int32 page numbers.
    lengths : torch.Tensor
        `(B,)` int32, entries of the table in use per row. Those beyond are never read, whatever they hold.
    counts : torch.Tensor
        `(N,)` int32, tokens in each page, 0..P.
    scale : float
        Factor on the logits.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    torch.Tensor
        `(B, Hq, n)` float32, `-inf` for pages without tokens and entries not in use.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    values = _nothing(keys, query.dtype)
    how = choose(query.device, backend, coded_dims(keys), compiled=is_listable(keys, values))
    if how not in ("torch", "numba"):
        # Triton takes pages that lie one after the other: two channels of zeros, a tenth of what the keys take.
        zeros = torch.zeros((keys.heads, keys.pages, keys.page_size, 2), dtype=query.dtype, device=query.device)
        values = PageCodes("none", keys.page_size, zeros)
    of_pages = paged_decode_attention(
        query, keys, values, table, lengths, counts, scale, page_lse=True, backend=backend
    )
    return of_pages[2]


def _nothing(keys: PageCodes, dtype: torch.dtype) -> PageCodes:
    """Return values that weigh nothing, a page of which stands for all."""
    page = torch.zeros((1, 1, keys.page_size, LANES), dtype=dtype, device=keys.codes.device)
    return PageCodes("none", keys.page_size, page.expand(keys.heads, keys.pages, -1, -1))
