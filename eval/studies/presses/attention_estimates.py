"""Ways to estimate the attention that a token will get, which the search for PiKVPress's score compared.

Shapes as in :mod:`pikv_hf.allocation.eviction_loss`, m observed queries and D the head dim of keys. Queries and keys
are those that attention multiplies: after rotary embedding and any norm.
"""

import torch


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, start: int = 0) -> torch.Tensor:
    """Rotate states as rotary embedding does, by positions of the caller's choice.

    Parameters
    ----------
    states : torch.Tensor
        `(..., D)` floating point.
    cos, sin : torch.Tensor
        `(R,)` or what broadcasts to `(..., R)`, of the angle of each rotated channel, R even; without the factor that
        some models scale them by.
    start : int
        Channels `start .. start + R - 1` are rotated, channel i of their first half with channel i of the second.

    Returns
    -------
    torch.Tensor
        `(..., D)`.

    Raises
    ------
    ValueError
        If there are fewer channels than angles.
    """
    stop = start + cos.shape[-1]
    if stop > states.shape[-1]:
        raise ValueError(f"rotating channels {start} to {stop - 1} needs more than {states.shape[-1]} channels")
    before, rotated, after = states[..., :start], states[..., start:stop], states[..., stop:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([before.expand(*rotated.shape[:-1], -1), rotated, after.expand(*rotated.shape[:-1], -1)], dim=-1)


def mean_rotation(cos: torch.Tensor, sin: torch.Tensor, dim: int, *, start: int = 0) -> torch.Tensor:
    """Return the average of rotations to n positions.

    Parameters
    ----------
    cos, sin, start
        As in :func:`turn`, `(n, R)` for n positions.
    dim : int
        D.

    Returns
    -------
    torch.Tensor
        `(D, D)`, to be multiplied by from the right.
    """
    return turn(torch.eye(dim, dtype=cos.dtype, device=cos.device), cos.mean(0), sin.mean(0), start=start)


def expected_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    ahead: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    query_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that a normally distributed query is expected to pay to each key (arXiv 2510.00636).

    With mean and covariance of the queries, `E exp(s q.k) = exp(s mean.k + s^2 k^T cov k / 2)`, normalised over the
    keys. The queries may be the real ones that attention saw, of a sample of tokens.

    Parameters
    ----------
    queries : torch.Tensor
        `(B, Hq, m, D)`, of tokens spread over the context, all moved to its end by :func:`turn`.
    keys : torch.Tensor
        `(B, H, T, D)`.
    scale : float
        What attention multiplies logits by.
    ahead : torch.Tensor, optional
        `(D, D)`, the average rotation from the end of the context to later positions, see :func:`mean_rotation`.
    valid : torch.Tensor, optional
        `(B, T)` bool, False for padding.
    query_valid : torch.Tensor, optional
        `(B, m)` bool, False for queries of padding.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, the average over the query heads of a KV head; its sum over tokens is 1.
    """
    grouped, columns = _grouped(queries, keys)
    if ahead is not None:
        grouped = grouped @ ahead.to(grouped)
    share = _query_shares(query_valid, grouped)
    mean = (grouped * share).sum(3, keepdim=True)
    centred = (grouped - mean) * share.sqrt()
    covariance = centred.transpose(-1, -2) @ centred
    logits = scale * (columns @ mean.transpose(-1, -2)).squeeze(-1)
    logits = logits + 0.5 * scale**2 * ((columns @ covariance) * columns).sum(-1)
    return _softmax(logits, None if valid is None else valid[:, None, None]).mean(2)


def observed_mass(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    valid: torch.Tensor | None = None,
    query_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that observed queries pay to each key, averaged over the queries that see it.

    Parameters
    ----------
    queries : torch.Tensor
        `(B, Hq, m, D)`.
    positions : torch.Tensor
        `(m,)` int64, the index of each query's own token among the keys; later keys are invisible to it.
    keys, scale, valid, query_valid
        As in :func:`expected_attention`.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, averaged over the query heads of a KV head; 0 for padding and for what no query sees.
    """
    grouped, columns = _grouped(queries, keys)
    seen = _visible(positions, keys.shape[2], valid, query_valid)
    mass = _softmax(scale * (grouped @ columns.transpose(-1, -2)), seen).mean(2).sum(2)
    return mass / seen[:, :, 0].sum(2).clamp(min=1)


def _grouped(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries `(B, H, Hq / H, m, D)` and keys `(B, H, 1, T, D)`, float32."""
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{queries.shape[1]} query heads do not divide by {keys.shape[1]} KV heads")
    return queries.float().unflatten(1, (keys.shape[1], -1)), keys.float().unsqueeze(2)


def _query_shares(query_valid: torch.Tensor | None, grouped: torch.Tensor) -> torch.Tensor:
    """Return the share of each query in an average over queries, `(B, 1, 1, m, 1)`."""
    if query_valid is None:
        return torch.full((1, 1, 1, grouped.shape[3], 1), 1 / grouped.shape[3], device=grouped.device)
    counted = query_valid.to(grouped)
    return (counted / counted.sum(1, keepdim=True).clamp(min=1))[:, None, None, :, None]


def _visible(
    positions: torch.Tensor, tokens: int, valid: torch.Tensor | None, query_valid: torch.Tensor | None
) -> torch.Tensor:
    """Return which keys each query sees, `(B or 1, 1, 1, m, T)` bool."""
    seen = (torch.arange(tokens, device=positions.device) <= positions[:, None])[None, None, None]
    if valid is not None:
        seen = seen & valid[:, None, None, None]
    return seen if query_valid is None else seen & query_valid[:, None, None, :, None]


def _softmax(logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax over what is seen; 0 everywhere for a query that sees nothing."""
    if seen is None:
        return logits.softmax(-1)
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
