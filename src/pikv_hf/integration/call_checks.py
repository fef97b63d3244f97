"""What a call of a model is refused for, all of it before any layer of the cache has changed.

Later layers would refuse it too, but sliding windows before them would have let go of tokens by then, and layers with
states of what these were.
"""

import inspect
from typing import Any

import torch
from torch import nn

from ..common.foreign_attributes import COLUMNS_ATTRIBUTE
from ..layer.layer import PiKVLayer
from ..layer.layer_list import complete_assignments, paged_layers
from ..layer.layer_reads import check_not_evicted
from ..layer.mask_columns import MaskColumns
from .call_arguments import KNOWN_ARGUMENTS, check_arguments, check_causal, check_owner_and_dropout
from .chosen_tokens import check_indexers
from .mask_function import check_mask_of_cache

#: What decoders and attention modules are called with, beside what attention functions are.
_COMMON = KNOWN_ARGUMENTS | {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


def check_call(
    attachment: Any, attention: nn.Module, module: nn.Module, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a call that a layer of the cache would refuse.

    Parameters
    ----------
    attachment : Attachment
        Of the model whose forward has begun.
    attention : torch.nn.Module
        The model's first attention.
    module : torch.nn.Module
        What is called: this attention, or the decoder if layers with states come before it.
    cache : Cache or None
        With which it is called.
    args, kwargs
        With which it is called, the cache among them.

    Raises
    ------
    ValueError
        For a cache of another model, dropout, and a mask that shows what was never stored.
    NotImplementedError
        For arguments that attention does not know, and `is_causal=False` without a mask.
    RuntimeError
        For attention that is not PiKV's, where tokens were evicted, keys assigned without values that fit, and indexers
        of layers that an interrupted call has left at different lengths.
    """
    if not hasattr(cache, "layers"):
        return
    complete_assignments(cache.layers)
    paged, mask = paged_layers(cache.layers), kwargs.get("attention_mask")
    check_owner_and_dropout(attachment, attention, cache)
    try:
        check_mask_of_cache(cache, mask)
    except ValueError as error:
        if kwargs.get("use_cache") is not False:
            raise
        # What matters first: some models have it so by default, whatever their caller said.
        raise ValueError(
            f"{error}. With a cache and use_cache=False generate() reads all tokens again in every step, into the same "
            "cache: leave out one of the two"
        ) from error
    if not attachment.is_active(attention.layer_idx):
        for layer in paged:
            check_not_evicted(layer.store)
        return
    check_indexers(attachment, paged, mask)
    check_arguments(attention, _passed_on(module, kwargs))
    if paged and _queries(args, kwargs) > 1:
        has_pages = module is attention and isinstance(cache.layers[attention.layer_idx], PiKVLayer)
        check_causal(f"layer {paged[0].layer_idx}", attention, kwargs, None if _may_be_none(mask, has_pages) else mask)


def _passed_on(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module that it passes on to attention functions as they are."""
    unknown = {name: value for name, value in kwargs.items() if name not in _COMMON}
    if unknown:
        own = inspect.signature(module.forward).parameters
        unknown = {name: value for name, value in unknown.items() if name not in own}
    return unknown


def _queries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many tokens each row of a call has, 0 if its arguments do not say."""
    given = [kwargs.get(name) for name in ("hidden_states", "inputs_embeds", "input_ids")]
    tokens = next((each for each in (*given, *args[:1]) if isinstance(each, torch.Tensor)), None)
    return 0 if tokens is None or tokens.ndim < 2 else tokens.shape[1]


def _may_be_none(mask: Any, has_pages: bool) -> bool:
    """Return whether paged layers have no mask, by that of the call or of a first layer without pages.

    A mask by which a window slides says nothing of theirs but for what else it hides.
    """
    if mask is None or has_pages:
        return mask is None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return bool(mask.all())
    columns = getattr(mask, COLUMNS_ATTRIBUTE, None)
    return isinstance(columns, MaskColumns) and columns.tells_padding and bool(columns.shown.all())
