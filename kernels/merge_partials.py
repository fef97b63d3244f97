"""Merging partial attention results by log-sum-exp."""

import torch

from .dispatch import choose, run


def merge_partials(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None = None, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of S disjoint sets of keys, from the attention over each.

    Parameters
    ----------
    outs : torch.Tensor
        `(S, B, Hq, Dv)` float32, softmax-normalised outputs over each set; finite where a set is empty.
    lses : torch.Tensor
        `(S, B, Hq)` float32, log-sum-exp of the logits over each set; `-inf` where a set is empty.
    sinks : torch.Tensor, optional
        `(Hq,)` floating point, logits without a value that take their share of the softmax (gpt-oss).
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    tuple of torch.Tensor
        `(B, Hq, Dv)` and the LSE of the keys alone `(B, Hq)`, float32. Where all sets are empty, 0 and `-inf`.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    if outs.dim() != 4 or lses.shape != outs.shape[:3] or (sinks is not None and sinks.shape != outs.shape[2:3]):
        of_sinks = "" if sinks is None else f" and sinks {tuple(sinks.shape)}"
        raise ValueError(f"outs {tuple(outs.shape)} with lses {tuple(lses.shape)}{of_sinks}")
    how = choose(outs.device, backend)
    if how != "torch":
        merged: tuple[torch.Tensor, torch.Tensor] = run("merge_partials", how, outs.device, outs, lses, sinks)
        return merged
    lse = torch.logsumexp(lses, dim=0)
    weights = (lses - _anchor(lse)).exp_()
    out = torch.einsum("sbhd,sbh->bhd", outs, weights)
    if sinks is not None:
        out *= _share(lse, sinks.to(lse.dtype)).unsqueeze(-1)
    return out, lse


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
    anchor = _anchor(merged)
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
    return out * _share(lse, sinks.to(lse.dtype).view(1, -1, 1)).unsqueeze(-1)


def _anchor(lse: torch.Tensor) -> torch.Tensor:
    # An empty union has lse = -inf, and -inf - -inf is NaN: anchor it at 0, where all weights become exp(-inf) = 0.
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _share(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(lse - sinks)
