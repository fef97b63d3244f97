"""Queries as attention used them, noted while the model reads: after rotary embedding, norms and everything else.

kvpress projects hidden states to queries a second time and forgets norms on models it does not know, such as Qwen3-MoE.
Here PiKV's attention function hands over what it was given, at no cost, on any architecture that it can be attached to.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from pikv_hf.allocation.observed_queries import ObservedCall, Observer
from pikv_hf.common.foreign_attributes import OBSERVER_ATTRIBUTE
from pikv_hf.common.transformers_release import INSTALLED, cache_of_call, with_cache
from pikv_hf.integration.attachment import ensure_attached
from pikv_hf.integration.attention_implementation import ATTENTION_NAME
from pikv_hf.integration.latent_attention import expands_latents
from pikv_hf.integration.noted_call import note_call
from pikv_hf.layer.mask_columns import new_tokens_valid


def observed(module: nn.Module, call: dict[str, Any] | None = None) -> Observer:
    """Return what was observed at an attention module.

    Parameters
    ----------
    module : nn.Module
        The attention.
    call : dict, optional
        The arguments of its last call. Some wrappers of kvpress do not tell the press within of the model, so that
        nothing was observed; the queries of this call are then made again.

    Raises
    ------
    RuntimeError
        If nothing was observed and no call is given.
    """
    observer = getattr(module, OBSERVER_ATTRIBUTE, None)
    config: Any = getattr(module, "config", None)
    # An observer may be left from a time when the model was attached.
    if isinstance(observer, Observer) and observer.recent is not None and attends_by_pikv(config):
        return observer
    if call is not None and "hidden_states" in call:
        return _observed_again(module, config, call)
    raise RuntimeError(
        f"no queries of {type(module).__name__} {getattr(module, 'layer_idx', '')} were observed; a press has to "
        "be entered with `with press(model):`, and the model must keep attn_implementation='pikv' meanwhile"
    )


def attends_by_pikv(config: Any) -> bool:
    """Return whether a model of this config calls PiKV's attention function, which observes."""
    return getattr(config, "_attn_implementation", ATTENTION_NAME) == ATTENTION_NAME


def _observed_again(module: nn.Module, config: Any, call: dict[str, Any]) -> Observer:
    """Run an attention module without a cache, up to where it attends."""
    observer = Observer()
    known = {name: value for name, value in call.items() if name != "pikv_stored"}
    arguments = with_cache(known, None)
    note_call(module, arguments, partial(_note, observer, _columns_before(module, call)))
    return observer


def _columns_before(module: nn.Module, call: dict[str, Any]) -> int:
    """Return how many columns a layer of a cache has before those of the call that has just been made."""
    layers = getattr(cache_of_call(call), "layers", None)
    # A row of a batch, taken out of it, is a prompt and in no cache.
    count = None if layers is None else getattr(layers[module.layer_idx], "get_seq_length", None)
    return 0 if count is None else max(0, int(count()) - call["hidden_states"].shape[1])


def _note(observer: Observer, past: int, query: torch.Tensor, mask: torch.Tensor | None, given: dict[str, Any]) -> None:
    scale = query.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"]
    valid = new_tokens_valid(mask, query.shape[2])
    observer(ObservedCall(query, past, valid, scale, given.get("s_aux"), given.get("softcap")))


def watch(model: Any) -> None:
    """Attach a model and observe its queries from now on.

    Presses within kvpress's wrappers are told of the model but not when they end; what is kept is small.
    """
    attachment = ensure_attached(model, "hash")
    check_has_keys(attachment.attention_modules())
    for module in attachment.attention_modules().values():
        Observer.of(module)


def check_has_keys(modules: dict[int, nn.Module]) -> None:
    """Raise `NotImplementedError` for attention whose tokens no press can score yet: latents, and what is indexed."""
    if chooses := [type(each).__name__ for each in modules.values() if getattr(each, "indexer", None) is not None]:
        raise NotImplementedError(
            f"{chooses[0]} reads the tokens that an indexer of its own chooses among all of them, those too that a "
            "press has evicted; the codecs of PiKVCache work there"
        )
    if latent := [type(module).__name__ for module in modules.values() if expands_latents(type(module))]:
        raise NotImplementedError(
            f"{latent[0]} is latent attention, of which transformers {INSTALLED} caches latents, not the keys and "
            "values that presses score; budget= and the codecs of PiKVCache work with them"
        )


def is_watched(modules: dict[int, nn.Module]) -> bool:
    """Return whether any of these attention modules is observed."""
    return any(isinstance(getattr(module, OBSERVER_ATTRIBUTE, None), Observer) for module in modules.values())


def unwatch(modules: dict[int, nn.Module]) -> None:
    """Undo :func:`watch`, but for the attachment."""
    for module in modules.values():
        if hasattr(module, OBSERVER_ATTRIBUTE):
            delattr(module, OBSERVER_ATTRIBUTE)
