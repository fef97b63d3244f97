"""Writing new tokens into their page slots."""

import torch


def append_tokens(pages: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Scatter tokens into a pool, in place.

    Parameters
    ----------
    pages : torch.Tensor
        `(H, N, P, D)`, the pool, contiguous.
    slots : torch.Tensor
        `(n,)` int64, `page * P + offset` of each token, without repetition.
    tokens : torch.Tensor
        `(H, n, D)`; any strides.
    """
    heads, count, size, dim = pages.shape
    pages.view(heads, count * size, dim).index_copy_(1, slots, tokens)
