"""What a model may ask of an attention function: what is not understood is refused, not ignored."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from ..common.transformers_release import CACHE_ARGUMENTS
from .chosen_tokens import BLOCK_INDICES, INDICES

#: Arguments that change what attention computes, and that PiKV's does as asked.
_HEEDED = {"s_aux", "softcap", "is_causal", INDICES, BLOCK_INDICES}
#: Arguments of other implementations, or of what is around attention; masks already say what windows hide.
_OF_OTHERS = {
    *TransformersKwargs.__annotations__,
    *FlashAttentionKwargs.__annotations__,
    *CACHE_ARGUMENTS,
    *("sliding_window", "cache_position", "use_cache", "return_dict"),
    *("logits_to_keep", "num_logits_to_keep"),
    *("target_dtype", "deterministic", "labels", "token_type_ids"),
}
#: All that calls of the attention function may come with beside what all attention functions have in common.
KNOWN_ARGUMENTS = frozenset(_HEEDED | _OF_OTHERS)


def check_arguments(module: torch.nn.Module, given: dict[str, Any]) -> None:
    """Raise `NotImplementedError` for arguments of an attention call that would have to be ignored.

    Parameters
    ----------
    module : torch.nn.Module
        The attention.
    given : dict
        The arguments by name, those that all attention functions have in common left out.
    """
    if given.keys() <= KNOWN_ARGUMENTS:
        return
    unknown = [name for name in given.keys() - KNOWN_ARGUMENTS if given[name] is not None and given[name] is not False]
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} calls its attention with {', '.join(sorted(unknown))}, which PiKV's does not "
            f"know (it knows {', '.join(sorted(_HEEDED))}); after detach(model), DynamicCache and "
            "PiKVCache(model.config) work with the model's own attention"
        )


def check_owner_and_dropout(attachment: Any, module: torch.nn.Module, cache: Any) -> None:
    """Raise `ValueError` if a cache was made for another model, or attention has dropout, before any layer has changed.

    Parameters
    ----------
    attachment : Attachment
        Of the model whose forward has begun.
    module : torch.nn.Module
        Its first attention.
    cache : Cache or None
        With which it is called.
    """
    made_for = getattr(cache, "attachment", None)
    if made_for is None:
        return
    if made_for is not attachment:
        raise ValueError(
            f"the cache was made for another model than the one that {type(module).__name__} belongs to; make one with "
            "PiKVCache.for_model(model)"
        )
    if module.training and (dropout := getattr(module, "attention_dropout", 0.0)):
        raise ValueError(f"attention dropout is {dropout}, but cached attention has none; call model.eval()")


def check_weights_not_asked(
    module: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any], replaced: Callable[[], set[Any]]
) -> None:
    """Raise `NotImplementedError` if a model is asked for attention weights and had them to give without PiKV.

    Other attention than eager forms no more weights than PiKV's: there it is a warning, as in transformers.

    Parameters
    ----------
    module : torch.nn.Module
        The model.
    args, given
        With which it is called.
    replaced : callable
        Returns the names of the attention implementations that PiKV's is in the place of, none while it is in none.
    """
    if len(args) > 1:
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **given}
    asked = given.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    if not asked or not (names := replaced()):
        return
    if names & {None, "eager"}:
        raise NotImplementedError(
            f"{type(module).__name__} is asked for attention weights (output_attentions=True), which its own attention "
            "('eager') forms and PiKV's does not; call detach(model) and use DynamicCache or PiKVCache(model.config)"
        )
    warnings.warn(
        f"output_attentions=True gives no attention weights: neither PiKV's attention forms them nor {names.pop()!r}",
        stacklevel=2,
    )


def is_causal(module: torch.nn.Module, given: dict[str, Any]) -> bool:
    """Return whether queries without a mask see no later token, as transformers' SDPA decides it."""
    asked = given.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def check_causal(where: str, module: torch.nn.Module, given: dict[str, Any], mask: torch.Tensor | None) -> None:
    """Raise `NotImplementedError` if one of several queries without a mask is to see later tokens."""
    if mask is None and not is_causal(module, given):
        raise NotImplementedError(
            f"{where}: is_causal=False asks for attention to later tokens; give a 4-D mask for it"
        )
