"""What evicting a token costs: pure functions of the attention it got, values and the output projection.

A press runs before the question is known, so the queries of the context have to speak for it. :func:`eviction_loss`
multiplies two estimates: the attention that a token will get, half of which is spread evenly, since what is asked may
be unlike all that was read; and how far its value is from what the head returns without it, behind the output
projection (:func:`value_distance`).

Taking probability p from a token with value v moves the output o of a head by `p / (1 - p) (v - o)` (CriticalKV, arXiv
2502.03805; RDKV, arXiv 2605.08317). The loss is in units of the residual stream, which all layers add to, so heads and
layers can be compared by it: heads that look nothing up, whose values are all alike, get few bytes without a prior.

Here B is the batch, H the KV heads, Hq the query heads (those of one KV head follow each other), T the tokens and Dv
the head dim of values. `eval/results/press-search.json` has the scores and losses that were compared.
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
        `(B, T)` or `(B, H, T)` bool, False for padding and what is not there.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, summed over the query heads of a KV head; 0 for padding.
    """
    real = _of_lanes(torch.ones_like(values[..., 0], dtype=torch.bool) if valid is None else valid)[..., None]
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
        `(B, H, T)`, not negative, as attention paid it; need not sum to 1.
    distance : torch.Tensor
        `(B, H, T)`, of :func:`value_distance`.
    smoothing : float
        Share of the probability that is spread evenly over the tokens of a lane, in [0, 1].
    valid : torch.Tensor, optional
        `(B, T)` or `(B, H, T)` bool, False for padding and what is not there.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32; its multiples by :data:`WIDTH_LOSS` are the losses that
        :func:`pikv_hf.allocation.bit_allocation.allocate` takes, all layers of a model together.

    Raises
    ------
    ValueError
        If `smoothing` is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is a share between 0 and 1, got {smoothing}")
    real = torch.ones_like(probability)
    if valid is not None:
        real = _of_lanes(valid).to(probability).expand_as(probability)
    smoothed = (1 - smoothing) * _shares(probability * real) + smoothing * _shares(real)
    return smoothed * distance


def recall_loss(recalled: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Return what evicting each token costs where it is known how well it would be recalled.

    How far the head's output moves, to first order: the most attention that the token would get, times the distance of
    its value from the mean (not its square, so that few tokens of long values do not take everything).

    Parameters
    ----------
    recalled : torch.Tensor
        `(B, H, T)`, of :func:`pikv_hf.allocation.recall.recall_mass`.
    distance : torch.Tensor
        `(B, H, T)`, of :func:`value_distance`, a square.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, as of :func:`eviction_loss`.
    """
    return recalled * distance.sqrt()


def _of_lanes(valid: torch.Tensor) -> torch.Tensor:
    """Return `(B, 1 or H, T)` of `(B, T)` or `(B, H, T)`."""
    return valid.unsqueeze(1) if valid.ndim == 2 else valid


def _shares(amounts: torch.Tensor) -> torch.Tensor:
    return amounts / amounts.sum(-1, keepdim=True).clamp(min=torch.finfo(amounts.dtype).tiny)
