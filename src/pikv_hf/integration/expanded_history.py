"""Latent attention of many queries: with the keys and values of all heads, some heads at a time.

For one query what makes keys and values of latents is cheaper in the query and the output. Of many queries each would
pay for it in every product with a token, and to expand the tokens once costs less.
"""

from typing import Any

import torch
from torch import nn

from ..layer import layer_reads
from ..layer.layer import PiKVLayer
from ..layer.layer_operation import layer_operation
from .latent_attention import projections

#: Bytes of the keys and values of so many heads at a time.
EXPANDED_BYTES = 256 << 20


def expanding_is_cheaper(module: Any, layer: PiKVLayer, queries: int) -> bool:
    """Return whether as many queries cost less with keys and values of all heads than with latents.

    Counted in products for each head and stored token. Where attention is to be counted by page, by a scheduler, or
    tokens are in other processes, queries go to the pages.
    """
    if layer.exchange is not None or layer.parts[0].scheduler is not None or layer.state.evicted:
        return False
    rank, plain, values = module.kv_b_proj.in_features, module.qk_nope_head_dim, module.v_head_dim
    return queries * (2 * rank - plain - values) > rank * (plain + values)


def attend_expanded(
    layer: PiKVLayer,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attend over a layer's latents and the new tokens.

    Parameters
    ----------
    layer : PiKVLayer
        It holds latents; its newest Q tokens are pending.
    module : torch.nn.Module
        The attention.
    query : torch.Tensor
        `(B, H, Q, Dn + Dr)`.
    key, value : torch.Tensor
        `(B, H, Q, Dn + Dr)` and `(B, H, Q, Dv)`, the new tokens.
    mask : torch.Tensor, optional
        `(B or 1, 1 or H, Q, T)` boolean or additive; None for causal.
    scale : float
        Factor on the logits.

    Returns
    -------
    torch.Tensor
        `(B, Q, H, Dv)`.
    """
    before, new = layer.seen - key.shape[2], key.shape[2]
    latents, rotary = layer_operation(layer_reads.dense_latents)(layer.store, before)
    if mask is None:
        mask = torch.ones((1, 1, new, layer.seen), dtype=torch.bool, device=query.device).tril_(before)
    of_keys, of_values = (part.to(latents.dtype) for part in projections(module))
    per_head = latents[..., :1].numel() * (key.shape[-1] + value.shape[-1]) * key.element_size()
    step = max(1, EXPANDED_BYTES // per_head)
    parts = []
    for first in range(0, query.shape[1], step):
        heads = slice(first, first + step)
        # (B, 1, T, R) by (h, R, D).
        plain, values = latents @ of_keys[heads].transpose(1, 2), latents @ of_values[heads].transpose(1, 2)
        keys = torch.cat([plain, rotary.expand(-1, plain.shape[1], -1, -1)], dim=-1)
        keys, values = torch.cat([keys, key[:, heads]], dim=2), torch.cat([values, value[:, heads]], dim=2)
        shown = mask if mask.shape[1] == 1 else mask[:, heads]
        parts.append(
            nn.functional.scaled_dot_product_attention(query[:, heads], keys, values, attn_mask=shown, scale=scale)
        )
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous()
