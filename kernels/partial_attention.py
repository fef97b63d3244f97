"""Attention over one part of the keys, returning what is needed to merge it with the other parts."""

import torch

from .merge_partials import merge_pair

# Logits are kept in float32; a block of them never exceeds this many elements (32 MiB), whatever the context length.
MAX_LOGITS = 8 * 1024 * 1024


def _softmax_stats(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn float32 logits `(..., T)` into unnormalised probabilities in place; return their sum and the LSE."""
    # A row without any visible key has peak -inf; anchored at a finite one its probabilities are all exp(-inf) = 0.
    peak = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    logits.sub_(peak).exp_()
    total = logits.sum(dim=-1, keepdim=True)
    return total, (total.log() + peak).squeeze(-1)


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    holes: torch.Tensor | None = None,
    softcap: float | None = None,
    page_lse: torch.Tensor | None = None,
    absorbed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over all given keys.

    Parameters
    ----------
    query : torch.Tensor
        `(N, M, D)`: N independent lanes, M queries each (the query heads of one KV head are folded into M).
    keys, values : torch.Tensor
        `(N, T, D)` and `(N, T, Dv)` in the query's dtype; any strides, nothing is copied for contiguous pages.
    scale : float
        Factor on the logits.
    bias : torch.Tensor, optional
        Added to the logits, broadcastable to `(N, M, T)`; `-inf` hides a key.
    holes : torch.Tensor, optional
        `(n,)` int64 indices into T of slots that hold no token.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)` before masking (Gemma-style).
    page_lse : torch.Tensor, optional
        `(N, M, n)` float32, written to: the LSE of each of the n pages of T / n neighbouring keys alone.
    absorbed : bool
        Whether tokens are those of latent attention (MLA, DeepSeek-V2, arXiv 2405.04434) with its projections in the
        queries: `keys` are latents, which are the values too, and `values` the rotary parts of the keys. The queries
        are `(N, M, D + Dv)`, and the output `(N, M, D)`.

    Returns
    -------
    tuple of torch.Tensor
        `out` `(N, M, Dv)` and `lse` `(N, M)`, float32. With no visible key, 0 and `-inf`.
    """
    lanes, queries, _ = query.shape
    tokens = keys.shape[1]
    block = max(1, MAX_LOGITS // max(1, lanes * queries))
    if tokens <= block:
        return _attend_block(query, keys, values, scale, bias, holes, softcap, page_lse, absorbed)
    size = 1 if page_lse is None else tokens // page_lse.shape[2]
    block = max(size, block // size * size)
    width = (keys if absorbed else values).shape[-1]
    out = query.new_zeros((lanes, queries, width), dtype=torch.float32)
    lse = query.new_full((lanes, queries), -torch.inf, dtype=torch.float32)
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        inside = None if holes is None else holes[(holes >= start) & (holes < end)] - start
        cut = bias[..., start:end] if bias is not None and bias.shape[-1] > 1 else bias
        pages = None if page_lse is None else page_lse[..., start // size : -(-end // size)]
        tokens_of_block = keys[:, start:end], values[:, start:end]
        part = _attend_block(query, *tokens_of_block, scale, cut, inside, softcap, pages, absorbed)
        out, lse = merge_pair(out, lse, *part)
    return out, lse


def _attend_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    holes: torch.Tensor | None,
    softcap: float | None,
    page_lse: torch.Tensor | None,
    absorbed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    unread, dim = query.new_empty((1, 1, 1)), keys.shape[-1]
    logits = torch.baddbmm(unread, query[..., :dim], keys.transpose(1, 2), beta=0, alpha=scale)
    if absorbed:
        logits, values = logits.baddbmm_(query[..., dim:], values.transpose(1, 2), alpha=scale), keys
    logits = logits.float()
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits.add_(bias)
    if holes is not None and holes.numel():
        logits.index_fill_(2, holes, -torch.inf)
    total, lse = _softmax_stats(logits)
    if page_lse is not None:
        # The logits are unnormalised probabilities by now: what they are relative to is lse - log(total).
        masses = logits.unflatten(2, (page_lse.shape[2], -1)).sum(dim=3)
        torch.add(masses.log_(), lse.unsqueeze(-1) - total.log(), out=page_lse)
    out = torch.bmm(logits.to(values.dtype), values).float()
    return out.div_(total.clamp_min_(torch.finfo(torch.float32).tiny)), lse


def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over dense keys whose last tokens are the queries' own: query i sees tokens `0 .. T - Q + i`.

    Parameters
    ----------
    query : torch.Tensor
        `(B, H, G, Q, D)`.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)`, T >= Q.
    scale : float
        Factor on the logits.
    bias : torch.Tensor, optional
        Added to the logits, broadcastable to `(B, H, G, Q, T)`; it replaces the causal pattern.
    softcap : float, optional
        As in :func:`partial_attention`.

    Returns
    -------
    tuple of torch.Tensor
        `out` `(B, H, G, Q, Dv)` and `lse` `(B, H, G, Q)`, float32.
    """
    batch, heads, group, length, dim = query.shape
    tokens = keys.shape[2]
    flat_keys = keys.reshape(batch * heads, tokens, dim)
    flat_values = values.reshape(batch * heads, tokens, -1)
    block = max(1, min(length, MAX_LOGITS // max(1, batch * heads * group * tokens)))
    outs, lses = [], []
    for start in range(0, length, block):
        end = min(start + block, length)
        rows, visible = end - start, tokens
        mask = None
        if bias is not None:
            mask = bias[..., start:end, :].expand(batch, heads, group, rows, tokens)
            mask = mask.reshape(batch * heads, group * rows, tokens)
        elif length > 1:
            visible = tokens - length + end
            hidden = torch.ones((rows, visible), dtype=torch.bool, device=query.device).triu_(visible - rows + 1)
            mask = torch.zeros((rows, visible), device=query.device).masked_fill_(hidden, -torch.inf).repeat(group, 1)
        part_out, part_lse = partial_attention(
            query[:, :, :, start:end].reshape(batch * heads, group * rows, dim),
            flat_keys[:, :visible],
            flat_values[:, :visible],
            scale,
            mask,
            softcap=softcap,
        )
        outs.append(part_out.view(batch, heads, group, rows, -1))
        lses.append(part_lse.view(batch, heads, group, rows))
    return torch.cat(outs, dim=3), torch.cat(lses, dim=3)
