"""What else than token ids has to be the same for K/V to be the same: the model's weights, and its active adapters."""

import hashlib
import itertools
import json
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache

from ..common.tensors import has_no_data
from ..common.transformers_release import cache_argument
from ..layer.own_layer import is_state_layer, layers_of
from ..serialization.model_adapters import Adapter, adapters_now
from ..serialization.model_fingerprint import Fingerprint


class ContextKey(NamedTuple):
    """What K/V were computed with; two that are equal may be given to one another's prompts.

    Attributes
    ----------
    weights : int
        A hash of which tensors the model's parameters and buffers are, and how often each was written to.
    adapters : tuple of str
        Those of PEFT in use, with their scaling.
    """

    weights: int
    adapters: tuple[str, ...]


def check_alike(model: nn.Module) -> None:
    """Raise `ValueError` for a model whose K/V depend on more than the tokens before, its weights and adapters.

    Rotary embeddings of the types `dynamic` and `longrope` turn with other frequencies once a prompt is longer. Some
    models remember positions of their last prompt for the next call. Some with states begin anew where several tokens
    come after others, in transformers itself (Jamba in 5.24): that is tried.
    """
    name = type(model).__name__
    if stateful := [path for path, module in model.named_modules() if hasattr(module, "rope_deltas")]:
        raise ValueError(f"{name}.{stateful[0]} keeps rope_deltas, positions of one prompt that the next would get")
    config: Any = model.config
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (given, *(one for one in given.values() if isinstance(one, dict)))}
    if varying := sorted(kinds & {"dynamic", "longrope"}):
        raise ValueError(f"K/V of {name} depend on the length of a prompt (rope_type {varying[0]!r})")
    if any(map(is_state_layer, layers_of(config))) and not _continues(model):
        raise ValueError(
            f"{name} does not go on from its states where several tokens come at once, with DynamicCache either"
        )


@torch.no_grad()
def _continues(model: Any) -> bool:
    """Return whether logits are alike, but for rounding, where a prompt comes in one call and in two."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (1, 24), generator=draw)
    ids, found = ids.to(model.device), []
    for parts in (ids.split(24, dim=1), ids.split(12, dim=1)):
        cache = DynamicCache(config=model.config)
        for part in parts:
            logits = model(part, **cache_argument(cache)).logits[0, -1].float()
        found.append(logits)
    # Rounding differs by far less in any dtype, and a forgotten state by more.
    return float((found[0] - found[1]).abs().max()) <= 0.02 * float(found[0].abs().max())


class ModelWatch:
    """Tells when a model computes other K/V than before: adapters were switched, or weights replaced or written to.

    A write through `parameter.data` leaves no trace; who does that makes a new store, or calls `forget()`.

    Parameters
    ----------
    model : nn.Module
        The model of transformers, outside of wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Another tensor may come to lie where one was.
        self._numbers = WeakIdKeyDictionary()
        self._next = itertools.count()

    def folder(self, options: str, salt: str) -> str:
        """Return the name of the folder for K/V that the model now computes, with these options and this salt."""
        fingerprint = Fingerprint.of(self._model).to_dict()
        text = json.dumps([fingerprint, options, salt], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def key(self) -> ContextKey:
        """Return the key of what the model computes now."""
        # accelerate replaces what it has offloaded in every call.
        own = [module for module in self._model.modules() if not _is_offloaded(module)]
        tensors = [each for module in own for each in (*module._parameters.values(), *module._buffers.values())]
        marks = [self._mark(each) for each in tensors if each is not None]
        adapters = adapters_now(self._model)
        return ContextKey(hash(tuple(marks)), tuple(map(_adapter_text, adapters)))

    def _mark(self, tensor: torch.Tensor) -> tuple[int, ...]:
        if (number := self._numbers.get(tensor)) is None:
            number = self._numbers[tensor] = next(self._next)
        # Tensors made in inference mode do not count what is written to them, and take no gradient step either.
        written = 0 if tensor.is_inference() else tensor._version
        return number, written, 0 if has_no_data(tensor) else tensor.data_ptr()


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def _adapter_text(adapter: Adapter) -> str:
    return f"{adapter.name} {adapter.merged} {adapter.scaling} {adapter.modules}"
