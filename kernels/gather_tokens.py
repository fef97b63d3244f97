"""Picking single tokens out of pages: what attention reads where a model chooses tokens, not pages.

In torch on every device: it is rows of tensors by their numbers, which torch's own kernels copy as fast as memory goes.
"""

import dataclasses

import torch

from .decode_pages import decode_pages
from .page_codes import BITS, PageCodes


def gather_tokens(pages: PageCodes, numbers: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode single tokens of packed or plain pages, and nothing else of these.

    Parameters
    ----------
    pages : PageCodes
        The pool: N pages of P tokens of H heads.
    numbers, slots : torch.Tensor
        `(n,)` int64: the page of each token, and its place there, 0..P-1. They may repeat.
    dtype : torch.dtype
        Of the result; the arithmetic is in float32.

    Returns
    -------
    torch.Tensor
        `(H, n, D + L)`; of no meaning in slots that hold no token.
    """

    def of_page(figures: torch.Tensor | None) -> torch.Tensor | None:
        return None if figures is None else figures.index_select(1, numbers)

    def of_token(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        flat = rows.flatten(1, 2) if rows.is_contiguous() else None
        if flat is None:
            return rows[:, numbers, at].unsqueeze(2)
        return flat.index_select(1, numbers * rows.shape[2] + at).unsqueeze(2)

    def of_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
        # A byte has the codes of the tokens r, r + R, r + 2R, ..., lowest bits first.
        rows = packed.shape[2]
        shift = (slots // rows * bits).to(torch.uint8)[None, :, None, None]
        return (of_token(packed, slots % rows) >> shift) & (2**bits - 1)

    tokens = dataclasses.replace(
        pages,
        page_size=1,
        codes=of_codes(pages.codes, BITS[pages.kind]) if pages.kind in BITS else of_token(pages.codes, slots),
        spread=of_page(pages.spread),
        floor=of_page(pages.floor),
        outliers=of_page(pages.outliers),
        fine=None if pages.fine is None else of_codes(pages.fine, 4),
        latent=None if pages.latent is None else of_token(pages.latent, slots),
    )
    return decode_pages(tokens, dtype).squeeze(2)
