"""Run an attention module up to where it attends, and have its queries noted instead."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

_NOTING = "pikv-noting"

#: What is called with queries `(B, Hq, Q, D)`, the mask, and what else attention was given.
Note = Callable[[torch.Tensor, torch.Tensor | None, dict[str, Any]], None]


class _Noting(threading.local):
    """In each thread, what an attached module's queries are noted by."""

    note: Note | None = None


NOTING = _Noting()


@torch.no_grad()
def note_call(module: nn.Module, arguments: dict[str, Any], note: Note) -> None:
    """Call an attention module's forward, without its hooks; what it returns is of no use."""
    config: Any = module.config
    implementation = config._attn_implementation
    AttentionInterface.register(_NOTING, _note_only)
    config._attn_implementation = _NOTING
    try:
        module.forward(**arguments, pikv_note=note)
    finally:
        config._attn_implementation = implementation


@torch.no_grad()
def note_attached_call(module: nn.Module, arguments: dict[str, Any], note: Note) -> None:
    """Do the same with a module that calls PiKV's attention function: what other threads run is not touched."""
    NOTING.note = note
    try:
        module.forward(**arguments)
    finally:
        NOTING.note = None


def attend_to_nothing(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Return what an attention function returns, without its work."""
    return query.new_zeros((*query.transpose(1, 2).shape[:3], value.shape[-1])), None


def _note_only(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **given: Any
) -> tuple[torch.Tensor, None]:
    """Stand in for an attention function of transformers: hand over the queries and attend to nothing."""
    given["pikv_note"](query, mask, given)
    return attend_to_nothing(query, value)
