"""Read a prompt once and give what its attention layers stored to many caches: each then goes on from there.

A prompt that is read at once attends to its own tokens as the model made them, whichever codec packs them afterwards.
So a cache that is filled this way holds what it would hold had the prompt been read through it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pikv_hf import PiKVCache
from pikv_hf.layer.layer_codecs import ERROR_QUERY_POSITIONS, remember_queries

#: Name of the attention function that keeps what it is given.
_CAPTURE = "pikv_capture"


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPrompt:
    """What the attention layers of a model made of a prompt of T tokens.

    Attributes
    ----------
    layers : list of tuple
        For each layer the newest queries `(B, Hq, m, D)`, keys `(B, H, T, D)` and values `(B, H, T, Dv)`, rotary
        embedding applied.
    valid : torch.Tensor or None
        `(B, T)` bool, False for padding.
    logits : torch.Tensor
        `(B, 1, V)`, of the last token.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    valid: torch.Tensor | None
    logits: torch.Tensor

    def fill(self, cache: Any) -> Any:
        """Store the prompt in an empty cache and return that."""
        for index, (query, keys, values) in enumerate(self.layers):
            if isinstance(cache, PiKVCache):
                layer = cache.layers[index]
                layer.update_from_attention(keys, values)
                layer.attend_begins(self.valid)
                remember_queries(layer.store, query, query.shape[-1] ** -0.5)
                layer.attend_ends()
            else:
                cache.update(keys, values, index)
        return cache


@torch.no_grad()
def read_once(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> ReadPrompt:
    """Read a prompt `(B, T)` without a cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With attention that takes no arguments beyond keys, queries and values.
    ids : torch.Tensor
        `(B, T)` int64.
    mask : torch.Tensor, optional
        `(B, T)`, 0 for padding on the left.
    """
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with captured(model, ERROR_QUERY_POSITIONS) as layers:
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits
    return ReadPrompt(layers, None if mask is None or bool(mask.all()) else mask.bool(), logits)


@contextmanager
def captured(model: Any, queries: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Collect the last `queries` queries, the keys and the values of every layer's attention, in order of layers."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def capture(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        seen.append((query[:, :, -queries:].clone(), key.clone(), value.clone()))
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register(_CAPTURE, capture)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_CAPTURE)
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)
