"""What evicting each token of a layer costs, by the queries that were observed and the layer's output projection."""

import torch

from .eviction_loss import SMOOTHING, eviction_loss, recall_loss, value_distance
from .known_recall import filled_recall
from .observed_queries import Observer, attention_mass


def token_loss(
    observer: Observer,
    gram: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    stored: torch.Tensor | None,
    recalled: torch.Tensor | None,
    *,
    smoothing: float = SMOOTHING,
) -> torch.Tensor:
    """Return what evicting each token would cost, `(B, H, T)` float32; 0 for what is not stored.

    Parameters
    ----------
    observer : Observer
        The latest queries. Without any, tokens are judged by their values alone.
    gram : torch.Tensor
        `(Hq, Dv, Dv)`, see :func:`~pikv_hf.allocation.eviction_loss.output_gram`.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)` by column.
    stored : torch.Tensor, optional
        `(B, H, T)` bool, False for padding and what was evicted.
    recalled : torch.Tensor or None
        `(B, H, T)` float32 of :func:`~pikv_hf.allocation.recall.recall_mass`, NaN where it is not known. Losses by it
        and by the latest queries' attention cannot be compared: layers that share a budget all have it, or none.
    smoothing : float
        Share of the expected attention that is spread evenly, where what would be recalled is not known.
    """
    there = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device) if stored is None else stored
    # Sums over thousands of tokens want more than half precision.
    with torch.autocast(keys.device.type, enabled=False):
        distance = value_distance(values, gram, valid=there)
        if recalled is None:
            return _finite(eviction_loss(_attention(observer, keys, there), distance, smoothing=smoothing, valid=there))
        if bool((recalled.isnan() & there).any()):
            recalled = filled_recall(recalled, _attention(observer, keys, there), there, smoothing)
        return _finite(recall_loss(recalled.nan_to_num(0.0) * there, distance))


def _attention(observer: Observer, keys: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return what the latest queries paid to each token; all are as likely to be looked at where nobody has asked."""
    if observer.recent is None:
        return stored.float()
    return attention_mass(observer, observer.recent, keys, stored, causal=keys.shape[2] == observer.seen)


def _finite(loss: torch.Tensor) -> torch.Tensor:
    """Return losses in which those of heads that have overflowed are like most others'."""
    finite = loss.isfinite()
    if bool(finite.all()):
        return loss
    return loss.where(finite, loss[finite].mean() if bool(finite.any()) else 1.0)
