"""Tokens that kvpress's head-wise presses mark on the attention module instead of removing them.

A mark does not say whose token it is. So it is noted which layer of which cache a module has read last: only that one
takes the marks, once, and evicts the tokens.
"""

import sys
import weakref
from typing import Any

import torch
from torch import nn

#: The attribute of an attention module by which kvpress's presses mark tokens.
MARKS = "masked_key_indices"
#: The layer of a cache that each attention module has read last.
_last_read: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def note_reader(module: nn.Module, layer: Any, prompt: bool) -> None:
    """Note that an attention module is about to read a layer of a `PiKVCache`.

    What is marked for the layer that was read before is evicted there first; what is marked for another cache ends, as
    do the marks of an earlier prompt in kvpress's own wrapper of attention functions. Some presses expect the
    attribute.
    """
    before = last_layer_read(module)
    layer.is_read = True
    if before is layer and not prompt:
        return
    if before is not None and before is not layer:
        before.is_read = False
        before.settle_marks()
    _last_read[module] = weakref.ref(layer)
    if "kvpress" in sys.modules:
        setattr(module, MARKS, None)


def forget_reader(module: nn.Module) -> None:
    """Note that another cache begins to be read: marks are no longer for the layer of before."""
    before = last_layer_read(module)
    if before is not None:
        before.is_read = False
        before.settle_marks()
    _last_read.pop(module, None)


def forget_is_read(module: nn.Module) -> None:
    """Have the layer that a module has read last ask again whether it is this one, and whether of this module."""
    before = last_layer_read(module)
    if before is not None:
        before.is_read = False


def last_layer_read(module: nn.Module) -> Any:
    """Return the layer that a module has read last, None if that was another cache's or is gone."""
    reference = _last_read.get(module)
    return None if reference is None else reference()


def without_marked(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask of a cache that is not PiKV's, with what is marked hidden, as kvpress hides it in SDPA.

    Parameters
    ----------
    module : nn.Module
        The attention; a prompt ends the marks of an earlier one.
    query, key : torch.Tensor
        `(B, Hq, Q, D)` and `(B, H, T, D)`.
    mask : torch.Tensor, optional
        `(B or 1, 1 or Hq, Q, T)`, boolean or additive; None is causal.
    """
    marks = getattr(module, MARKS, None)
    if marks is None:
        return mask
    queries, tokens = query.shape[2], key.shape[2]
    if queries == tokens:
        setattr(module, MARKS, None)
        return mask
    visible = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    visible[tuple(marks)] = False
    visible = visible.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
    if mask is None:
        mask = torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=key.device).tril_(tokens - queries)
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


def take_marks(module: nn.Module, layer: Any) -> Any:
    """Return, once, `(rows, heads, columns)` of what is marked on the module that read this layer last, or None."""
    if last_layer_read(module) is not layer:
        return None
    marks = getattr(module, MARKS, None)
    if marks is not None:
        setattr(module, MARKS, None)
    return marks
