"""Merging partial attention results by log-sum-exp."""

import torch


def merge_pair(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Parameters
    ----------
    out, other_out : torch.Tensor
        `(..., Dv)` float32, softmax-normalised outputs over either set.
    lse, other_lse : torch.Tensor
        `(...)` float32, log-sum-exp of the logits over either set; `-inf` where a set is empty.

    Returns
    -------
    tuple of torch.Tensor
        The merged `(out, lse)`. Where both sets are empty the output is 0 and the LSE `-inf`.
    """
    merged = torch.logaddexp(lse, other_lse)
    # An empty union has merged = -inf, and -inf - -inf is NaN: anchor it at 0, where both weights become exp(-inf) = 0.
    anchor = merged.masked_fill(merged == -torch.inf, 0.0)
    weight, other_weight = (lse - anchor).exp_(), (other_lse - anchor).exp_()
    return out * weight.unsqueeze(-1) + other_out * other_weight.unsqueeze(-1), merged


def merge_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Let each head's attention sink, a logit without a value, take its share of the softmax (gpt-oss).

    Parameters
    ----------
    out, lse : torch.Tensor
        `(B, Hq, Q, Dv)` and `(B, Hq, Q)` float32.
    sinks : torch.Tensor
        `(Hq,)`, one logit per query head.

    Returns
    -------
    torch.Tensor
        `(B, Hq, Q, Dv)`, the output scaled by `exp(lse) / (exp(lse) + exp(sink))`.
    """
    return out * torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1)).unsqueeze(-1)
