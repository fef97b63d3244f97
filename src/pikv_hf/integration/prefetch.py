"""Reading ahead: while one layer computes, the pages that routing will want in the next are brought into fast memory.

The hidden states of neighbouring layers are alike, so that what goes into one layer's attention, taken through the next
layer's query projection, is close to the query that is to come: the idea of InfiniGen (Lee et al., arXiv 2406.19707),
without its offline rotation.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.transformers_release import cache_of_call
from ..layer.layer import PiKVLayer
from ..layer.layer_operation import layer_operation
from ..page_table.page_table import PageTable
from ..routing.page_router import PageRouter
from ..tiers.tiered_pool import TieredPool


def prefetch_next_layer(
    attention_of: Callable[[int], nn.Module | None], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a layer's attention decodes one token: have the next paged layer fetch what it is likely to read.

    Parameters
    ----------
    attention_of : callable
        Returns the attention module of a layer of the model.
    module : nn.Module
        The attention that is about to be called.
    args, kwargs
        With which it is called.
    """
    cache: Any = cache_of_call(kwargs)
    if getattr(cache, "tiers", None) is None:
        return
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden, torch.Tensor) or hidden.shape[1] != 1:
        return
    following = next((x for x in cache.layers[module.layer_idx + 1 :] if isinstance(x, PiKVLayer)), None)
    if following is None or following.parts[0].page_router is None:
        return
    if (attention := attention_of(following.layer_idx)) is None:
        return
    query = predicted_query(attention, hidden, kwargs.get("position_embeddings"))
    if query is not None:
        prefetch(following, query, float(getattr(attention, "scaling", query.shape[-1] ** -0.5)))


@layer_operation
def prefetch(layer: PiKVLayer, query: torch.Tensor, scale: float) -> None:
    """Begin to fetch the pages that a layer would read for queries `(B, Hq, D)`; never fails for what it cannot get."""
    for part in layer.parts:
        if part.table is not None and part.page_router is not None and query.shape[0] == layer.batch:
            _prefetch(part.table, part.page_router, query.to(part.device), scale, layer.seen + 1)


def _prefetch(table: PageTable, page_router: PageRouter, query: torch.Tensor, scale: float, seen: int) -> None:
    rows = query.reshape(len(table.rows), -1, query.shape[-1])
    index = table.view.full_pages()
    choice = page_router.choose(index, rows, scale, seen)
    if choice is None:
        return
    pages = index.pages.expand(len(choice.columns), -1, -1).gather(2, choice.columns)
    counted = torch.ones_like(pages, dtype=torch.bool) if choice.taken is None else choice.taken
    for pool_id, pool in index.pools.items():
        if not isinstance(pool, TieredPool):
            continue
        part = index.columns[pool_id]
        mine = counted & (choice.columns >= part.start) & (choice.columns < part.stop)
        pool.prefetch(torch.unique(pages[mine]).cpu().numpy())


@torch.no_grad()
def predicted_query(attention: Any, hidden: torch.Tensor, rotation: Any) -> torch.Tensor | None:
    """Return the queries `(B, Hq, D)` that an attention module would make of `hidden` `(B, 1, E)`.

    Only for modules with one query projection, an optional norm of queries, and rotary embeddings of their own module:
    None for others, such as multi-head latent attention.
    """
    projection, dim = getattr(attention, "q_proj", None), getattr(attention, "head_dim", None)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if projection is None or dim is None or rotate is None or not isinstance(rotation, tuple):
        return None
    try:
        query = projection(hidden.to(next(projection.parameters()).device))
        query = _normed(query, getattr(attention, "q_norm", None), dim).transpose(1, 2)
        turned, _ = rotate(query, query, *(part.to(query.device) for part in rotation))
    except (RuntimeError, TypeError, ValueError):
        # A guess of another architecture's making; the step itself does not depend on it.
        return None
    return turned[:, :, 0] if turned.shape == query.shape else None


def _normed(query: torch.Tensor, norm: Any, dim: int) -> torch.Tensor:
    """Return `(B, 1, Hq * D)` as `(B, 1, Hq, D)`, normed over all heads or within each, as the norm's size tells."""
    if norm is not None and getattr(norm, "weight", query).numel() == query.shape[-1]:
        return norm(query).unflatten(-1, (-1, dim))
    heads = query.unflatten(-1, (-1, dim))
    return heads if norm is None else norm(heads)
