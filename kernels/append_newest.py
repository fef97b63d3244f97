"""Writing the newest token of each row, with its position, into its page slot."""

import torch

from .dispatch import choose, run


def append_newest(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    *,
    backend: str | None = None,
) -> None:
    """Write one token per row into a pool, in place.

    Parameters
    ----------
    key_pages, value_pages : torch.Tensor
        `(H, N, P, D)` and `(H, N, P, Dv)`, the pool; pages contiguous and side by side.
    positions : torch.Tensor
        `(N, P)` int32, contiguous.
    slots : torch.Tensor
        `(B,)` int64, `page * P + offset` of a slot of each row, without repetition.
    offset : int
        How many slots behind that the row's token goes, not below 0.
    keys, values : torch.Tensor
        `(B, H, 1, D)` and `(B, H, 1, Dv)` of the pool's dtype; any strides.
    position : int
        Of all of them.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Raises
    ------
    ValueError
        If shapes do not match.
    TypeError
        If the tokens have another dtype than the pool.
    """
    for pages, tokens in ((key_pages, keys), (value_pages, values)):
        heads, _, _, dim = pages.shape
        if tokens.shape != (len(slots), heads, 1, dim):
            raise ValueError(f"tokens {tuple(tokens.shape)} for {len(slots)} slots of a pool {tuple(pages.shape)}")
        if tokens.dtype != pages.dtype:
            raise TypeError(f"tokens of {tokens.dtype} for a pool of {pages.dtype}")
    how = choose(key_pages.device, backend)
    if how != "torch":
        pool = key_pages, value_pages, positions
        run("append_newest", how, key_pages.device, *pool, slots, offset, keys, values, position)
        return
    for pages, tokens in ((key_pages, keys), (value_pages, values)):
        pages.flatten(1, 2)[:, offset:].index_copy_(1, slots, tokens.squeeze(2).transpose(0, 1))
    positions.view(-1)[offset:].index_fill_(0, slots, position)
