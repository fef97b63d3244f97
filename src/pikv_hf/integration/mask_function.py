"""Attention masks at logical lengths, read by the positions of stored tokens."""

from typing import Any

import numpy as np
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..common.foreign_attributes import COLUMNS_ATTRIBUTE
from ..common.tensors import has_no_data
from ..common.transformers_release import queries_of_mask
from ..layer.layer import PiKVLayer
from ..layer.mask_columns import MaskColumns, check_shows_no_padding, trailing_columns


def pikv_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build the boolean mask of the library's SDPA implementation, or None where nothing but the future is hidden.

    Called by transformers with changing signatures, so that the arguments are only passed on. The mask spans logical
    positions; :class:`~pikv_hf.attention.mask_bias.MaskBias` picks the columns of the tokens that are stored.
    """
    if any(has_no_data(given) for given in (*args, *kwargs.values())):
        # Of which nothing can be read; no PiKVCache takes such K/V.
        return sdpa_mask(*args, **kwargs)
    shown = _shown(kwargs)
    is_causal = (
        kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("kv_offset", 0) == 0
        and kwargs.get("allow_is_causal_skip", False)
    )
    queries, last = queries_of_mask(kwargs)
    # One query sees all there is, and a prompt is its own history, wherever the caller says that they are.
    sees_all = queries in (1, kwargs["kv_length"]) or int(last) == kwargs["kv_length"] - 1
    if is_causal and sees_all and (shown is None or bool(shown.all())):
        return None
    # A static cache has columns after the last query, which only a mask hides.
    mask = sdpa_mask(*args, **kwargs if sees_all else {**kwargs, "allow_is_causal_skip": False})
    if mask is not None:
        is_causal = is_causal and int(last) == kwargs["kv_length"] - 1
        length = kwargs["kv_length"] + kwargs.get("kv_offset", 0)
        columns = np.ones((1, length), dtype=np.bool_) if shown is None else shown.cpu().numpy()
        setattr(mask, COLUMNS_ATTRIBUTE, MaskColumns(columns, mask.shape[2], is_causal, tells_padding=True))
    return mask


def _shown(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the 2-D mask that transformers was given, `(B, T)` bool over all positions so far, None without one."""
    given, length = kwargs.get("attention_mask"), kwargs["kv_length"] + kwargs.get("kv_offset", 0)
    if given is None or given.ndim != 2:
        return None
    # As transformers has it: what a mask does not reach is hidden.
    missing = max(0, length - given.shape[1])
    return torch.nn.functional.pad(given, (0, missing))[:, :length].bool()


def columns_of_layer(layer: PiKVLayer, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask of the model's positions by the columns of a layer.

    Parameters
    ----------
    layer : PiKVLayer
        It has the tokens of the call already.
    mask : torch.Tensor, optional
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive.

    Raises
    ------
    ValueError
        If it is of other positions than the cache has seen, shows what was never stored, or hides some of the tokens
        that were assigned from outside, of which nobody knows to which positions they belong.
    """
    where, state = f"layer {layer.layer_idx}", layer.store.state
    if mask is None and state.padding is None:
        return None
    if mask is not None and mask.shape[-1] != state.positions_seen:
        raise ValueError(
            f"{where}: the attention mask spans {mask.shape[-1]} positions, the cache {state.positions_seen}"
        )
    if mask is not None and state.dropped:
        assigned = state.dropped + state.assigned
        if not MaskColumns.of(mask).shown[:, :assigned].all():
            raise ValueError(
                f"{where}: the attention mask hides some of the first {assigned} positions, of which "
                f"{state.assigned} tokens were assigned from outside; which ones is not known"
            )
        mask = trailing_columns(mask, state.seen)
    check_shows_no_padding(where, state.padding, None if mask is None else MaskColumns.of(mask))
    return mask


def check_mask_of_cache(cache: Any, mask: Any) -> None:
    """Raise `ValueError` if a call's mask shows what the paged layers of a cache have never stored.

    Called before the first layer of a model has got anything, with the mask of that layer, whichever attention it has.
    One that says nothing of the padding, since a window is all it spans, is left to the paged layers themselves.
    """
    layer = next((x for x in getattr(cache, "layers", ()) if isinstance(x, PiKVLayer)), None)
    if layer is None or (padding := layer.store.padding_columns()) is None:
        return
    if mask is None:
        check_shows_no_padding("the cache", padding, None)
    elif isinstance(mask, torch.Tensor):
        columns = MaskColumns.of(mask)
        new = columns.shown.shape[1] - layer.state.positions_seen
        # One of two dimensions, as flash attention has it, is of all positions.
        if mask.ndim == 2 or columns.new == new:
            check_shows_no_padding("the cache", padding, columns.last(layer.seen + new))
