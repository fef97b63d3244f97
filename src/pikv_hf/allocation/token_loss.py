"""What evicting each token of a layer costs, by the queries that were observed and the layer's output projection."""

import torch

from .eviction_loss import SMOOTHING, eviction_loss, recall_loss, value_distance
from .observed_queries import Observer, attention_mass


def token_loss(
    observer: Observer,
    gram: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    stored: torch.Tensor | None,
    *,
    smoothing: float = SMOOTHING,
) -> torch.Tensor:
    """Return what evicting each token would cost, `(B, H, T)` float32.

    Parameters
    ----------
    observer : Observer
        The latest queries. Where there are none tokens are judged by their values alone.
    gram : torch.Tensor
        `(Hq, Dv, Dv)`, see :func:`~pikv_hf.allocation.eviction_loss.output_gram`.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)` by column.
    stored : torch.Tensor, optional
        `(B, H, T)` bool, False for padding and what was evicted.
    smoothing : float
        Share of the expected attention that is spread evenly, where what would be recalled is not known.
    """
    # Sums over thousands of tokens want more than half precision.
    with torch.autocast(keys.device.type, enabled=False):
        return _loss(observer, gram, keys, values, stored, smoothing)


def _loss(
    observer: Observer,
    gram: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    stored: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    valid = None if stored is None else stored.any(dim=1)
    if observer.recalled is not None and observer.knows_recall_of(keys):
        return recall_loss(observer.recalled, value_distance(values, gram, valid=valid))
    if observer.recent is None:
        # Nobody has asked anything yet: all are as likely to be looked at.
        return eviction_loss(
            torch.ones_like(keys[..., 0]).float(), value_distance(values, gram, valid=valid), valid=valid
        )
    causal = keys.shape[2] == observer.seen
    probability = attention_mass(observer, observer.recent, keys, stored, causal)
    distance = value_distance(values, gram, valid=valid)
    return eviction_loss(probability, distance, smoothing=smoothing, valid=valid)
