"""Attention over dense K/V in differentiable operations, for calls whose gradients are wanted."""

import torch

# Where everything is hidden from a query, -inf would make NaN of its weights, and of every gradient behind them.
HIDDEN = torch.finfo(torch.float32).min / 2


def needs_gradients(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd records what is computed of any of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to dense tokens, all logits at once.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, Q, D)`, with the factor on the logits applied.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)` in the query's dtype.
    bias : torch.Tensor
        Float32, added to the logits, broadcastable to `(B, H, G, Q, T)`; `-inf` hides a token.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)` before the bias is added.
    sinks : torch.Tensor, optional
        `(Hq,)`, logits without a value that take their share of the softmax.

    Returns
    -------
    torch.Tensor
        `(B, Hq, Q, Dv)` in the query's dtype.
    """
    batch, heads, tokens, _ = keys.shape
    grouped = query.unflatten(1, (heads, -1))
    logits = (grouped @ keys.unsqueeze(2).transpose(-1, -2)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias.clamp_min(HIDDEN)
    if sinks is not None:
        each = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, query.shape[2], 1)
        logits = torch.cat([logits, each], dim=-1)
    shares = logits.softmax(dim=-1)[..., :tokens]
    return (shares.to(values.dtype) @ values.unsqueeze(2)).flatten(1, 2)
