"""Writing new tokens into their page slots."""

import torch

from .dispatch import choose, run


def append_tokens(
    pages: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, *, backend: str | None = None
) -> None:
    """Scatter tokens into a pool, in place.

    Parameters
    ----------
    pages : torch.Tensor
        `(H, N, P, D)`, the pool; pages contiguous and side by side.
    slots : torch.Tensor
        `(n,)` int64, `page * P + offset` of each token, without repetition.
    tokens : torch.Tensor
        `(H, n, D)` of the pool's dtype; any strides.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Raises
    ------
    ValueError
        If shapes do not match.
    TypeError
        If the tokens have another dtype than the pool.
    """
    heads, count, size, dim = pages.shape
    if tokens.shape != (heads, slots.shape[0], dim):
        raise ValueError(f"tokens {tuple(tokens.shape)} for {slots.shape[0]} slots of a pool {tuple(pages.shape)}")
    if tokens.dtype != pages.dtype:
        raise TypeError(f"tokens of {tokens.dtype} for a pool of {pages.dtype}")
    how = choose(pages.device, backend)
    if how != "torch":
        run("append_tokens", how, pages.device, pages, slots, tokens)
    else:
        pages.view(heads, count * size, dim).index_copy_(1, slots, tokens)
