"""What a token of a KV cache is worth to the queries to come: pure functions of observed queries, keys and values.

A press runs before the question is known, so the queries of the context have to speak for it. :func:`eviction_loss`
multiplies two estimates:

- the attention that a token will get: :func:`expected_attention` (Expected Attention, arXiv 2510.00636), or
  :func:`observed_mass` (SnapKV, arXiv 2404.14469) where there is no rotary embedding to speak of;
- how far its value is from what the head returns without it, behind the output projection: :func:`value_distance`.

Taking probability p from a token with value v moves the output o of a head by `p / (1 - p) (v - o)` (CriticalKV, arXiv
2502.03805; RDKV, arXiv 2605.08317). The loss is in units of the residual stream, which all layers add to, so heads and
layers can be compared by it: heads that look nothing up, whose values are all alike, get few bytes without a prior.

Here B is the batch, H the KV heads, Hq the query heads (those of one KV head follow each other), m the observed
queries, T the tokens, D the head dim of keys and Dv that of values. Queries and keys are those that attention
multiplies: after rotary embedding and any norm. Attention sinks and soft caps of logits are left out of account.
"""

from collections.abc import Mapping

import torch

#: Loss of storing a token in so many bits, as a share of the loss of evicting it. Found by the scores of tasks: bounds
#: from the error of logits did worse, see `eval/results/press-search.json`.
WIDTH_LOSS: Mapping[int, float] = {0: 1.0, 2: 0.2, 4: 0.012, 8: 4e-5}

#: Share of the probability that is spread evenly over all tokens: what is asked may be unlike all that was read.
SMOOTHING = 0.5


def output_gram(weight: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Return what measures a head's output as the output projection lets it through: `|W x|^2 = x^T (W^T W) x`.

    Parameters
    ----------
    weight : torch.Tensor
        `(hidden, Hq * Dv)`, the weight of `o_proj`.
    query_heads : int
        Hq.

    Returns
    -------
    torch.Tensor
        `(Hq, Dv, Dv)` float32.

    Raises
    ------
    ValueError
        If the columns do not divide by the heads.
    """
    if weight.shape[1] % query_heads:
        raise ValueError(f"an output projection of {weight.shape[1]} columns does not divide by {query_heads} heads")
    heads = weight.float().unflatten(1, (query_heads, -1))
    return torch.einsum("ohd,ohe->hde", heads, heads)


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


def value_distance(values: torch.Tensor, gram: torch.Tensor, *, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return the squared distance of each value from the mean value of its lane, behind the output projection.

    The mean stands for the output of a head that finds nothing. The plain norm of a value, which Expected Attention
    weighs tokens by, also counts what all values share, which stays when a token goes.

    Parameters
    ----------
    values : torch.Tensor
        `(B, H, T, Dv)`.
    gram : torch.Tensor
        `(Hq, Dv, Dv)`, see :func:`output_gram`.
    valid : torch.Tensor, optional
        `(B, T)` bool, False for padding.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, summed over the query heads of a KV head; 0 for padding.
    """
    real = torch.ones(values.shape[:1] + values.shape[2:3], dtype=torch.bool, device=values.device)
    real = (real if valid is None else valid)[:, None, :, None]
    exact = values.float() * real
    centred = (exact - exact.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)) * real
    shared = gram.to(exact).unflatten(0, (values.shape[1], -1)).sum(1)
    return ((centred @ shared) * centred).sum(-1).clamp(min=0)


def eviction_loss(
    probability: torch.Tensor,
    distance: torch.Tensor,
    *,
    smoothing: float = SMOOTHING,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what evicting each token costs: its smoothed probability times its distance.

    Parameters
    ----------
    probability : torch.Tensor
        `(B, H, T)`, not negative, of :func:`expected_attention` or :func:`observed_mass`; need not sum to 1.
    distance : torch.Tensor
        `(B, H, T)`, of :func:`value_distance`.
    smoothing : float
        Share of the probability that is spread evenly over the tokens of a lane, in [0, 1].
    valid : torch.Tensor, optional
        `(B, T)` bool, False for padding.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32; its multiples by :data:`WIDTH_LOSS` are the losses that
        :func:`pikv_hf.presses.water_filling.allocate` takes, all layers of a model together.

    Raises
    ------
    ValueError
        If `smoothing` is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is a share between 0 and 1, got {smoothing}")
    real = torch.ones_like(probability) if valid is None else valid[:, None].to(probability).expand_as(probability)
    smoothed = (1 - smoothing) * _shares(probability * real) + smoothing * _shares(real)
    return smoothed * distance


def _shares(amounts: torch.Tensor) -> torch.Tensor:
    return amounts / amounts.sum(-1, keepdim=True).clamp(min=torch.finfo(amounts.dtype).tiny)


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
