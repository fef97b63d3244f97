"""Attention in transformers' continuous batching, which brings a paged cache of its own and packs sequences into a row.

It asks for `"paged|"` before the name of the model's implementation. Under that name PiKV's attention is the library's
own: the library makes masks for the names that it knows alone, so that they are made here.
"""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def is_batched(given: dict[str, Any]) -> bool:
    """Return whether a call of the attention function comes from continuous batching, by its arguments."""
    return given.get("cache") is not None and "read_index" in given


def attend_batched(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    given: dict[str, Any],
) -> tuple[torch.Tensor, Any]:
    """Attend as transformers does in a continuous batch whose model has no attention of PiKV's.

    Parameters
    ----------
    module : torch.nn.Module
        The attention.
    query, key, value : torch.Tensor
        `(1, Hq, Q, D)`, `(1, H, Q, D)` and `(1, H, Q, Dv)`, sequences one after the other.
    scaling : float
        Factor on the logits.
    given : dict
        The other arguments of the call: the cache, where to read and write in it, and where sequences end.
    """
    cache, index, ends = given["cache"], module.layer_idx, given["cu_seq_lens_k"]
    # 1 where a layer does not slide.
    window = cache.sliding_windows[index]
    if isinstance(ends, dict):
        ends = ends["sliding_attention" if window > 1 else "full_attention"]
    group, _ = cache.layer_index_to_group_indices[index]
    keys = given["read_index"][group].numel()
    shown = packed_causal_mask(given["cu_seq_lens_q"], ends, query.shape[2], keys, window)
    mask = torch.zeros(shown.shape, dtype=query.dtype, device=query.device)
    mask.masked_fill_(~shown, torch.finfo(query.dtype).min)
    # As the library chooses for models with attention sinks, which its SDPA leaves out.
    own = ALL_ATTENTION_FUNCTIONS["paged|eager" if hasattr(module, "sinks") else "paged|sdpa"]
    # The mask says where sequences end. kvpress's wrapper writes into what says it, which later layers need.
    others = {name: argument for name, argument in given.items() if name != "cu_seq_lens_k"}
    return own(module, query, key, value, mask, dropout=0.0, scaling=scaling, **others)


def packed_causal_mask(
    query_ends: torch.Tensor, key_ends: torch.Tensor, queries: int, keys: int, window: int
) -> torch.Tensor:
    """Return which keys each query sees: those of its own sequence up to itself, of which the queries are the last.

    Parameters
    ----------
    query_ends, key_ends : torch.Tensor
        `(B + 1,)`, where sequences begin and end, from 0 on.
    queries, keys : int
        Q and T. What comes after the last end is padding, whose queries see everything, so that nothing is undefined.
    window : int
        How many keys a query sees at most, 1 for all.

    Returns
    -------
    torch.Tensor
        `(1, 1, Q, T)` bool. Made of tensor operations alone, for CUDA graphs.
    """
    device, last = query_ends.device, query_ends.shape[0] - 2
    at, to = torch.arange(queries, device=device), torch.arange(keys, device=device)
    row = torch.searchsorted(query_ends.long(), at, right=True) - 1
    column = torch.searchsorted(key_ends.long(), to, right=True) - 1
    sequence = row.clamp_max(last)
    # The key of a query, counted from the end of its sequence.
    own = key_ends.long()[sequence + 1] - query_ends.long()[sequence + 1] + at
    behind = own[:, None] - to
    shown = (row[:, None] == column) & (behind >= 0)
    if window > 1:
        shown &= behind < window
    return (shown | (row > last)[:, None])[None, None]
