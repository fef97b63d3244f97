"""Decoding packed pages."""

import torch

from .bit_packing import unpack
from .page_codes import BITS, FP8_MAX, PageCodes, floor_values, spread_values


def decode_pages(pages: PageCodes, dtype: torch.dtype) -> torch.Tensor:
    """Decode pages.

    Parameters
    ----------
    pages : PageCodes
        N pages of any kind.
    dtype : torch.dtype
        Of the result; the arithmetic is in float32.

    Returns
    -------
    torch.Tensor
        `(H, N, P, D + L)`; for kind `"none"` the stored tensor itself if it has that dtype.
    """
    tokens = _open_codes(pages, dtype)
    return tokens if pages.latent is None else torch.cat([tokens, pages.latent.to(dtype)], dim=-1)


def _open_codes(pages: PageCodes, dtype: torch.dtype) -> torch.Tensor:
    if pages.kind == "none":
        return pages.codes.to(dtype)
    assert pages.spread is not None
    spread = spread_values(pages.spread).unsqueeze(2)
    if pages.kind == "fp8":
        return (pages.codes.view(torch.float8_e4m3fn).float() * (spread / FP8_MAX)).to(dtype)
    step = spread / pages.levels
    tokens = unpack(pages.codes, BITS[pages.kind], pages.page_size).float()
    tokens = torch.addcmul(floor_values(pages).unsqueeze(2), tokens, step)
    if pages.outliers is not None and pages.fine is not None:
        index = pages.outliers.long().unsqueeze(2)
        fine = unpack(pages.fine, 4, pages.page_size).float()
        extra = step.gather(-1, index) * ((fine + 0.5) / 16 - 0.5)
        tokens.scatter_add_(-1, index.expand(-1, -1, pages.page_size, -1), extra)
    return tokens.to(dtype)
