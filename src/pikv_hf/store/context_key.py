"""What else than token ids has to be the same for K/V to be the same: the model's weights, and its active adapters."""

import hashlib
import itertools
import json
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

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
        tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        self._tables = [table for table in tables if table]
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
        marks = [self._mark(tensor) for table in self._tables for tensor in table.values() if tensor is not None]
        adapters = adapters_now(self._model)
        return ContextKey(hash(tuple(marks)), tuple(map(_adapter_text, adapters)))

    def _mark(self, tensor: torch.Tensor) -> tuple[int, int]:
        if (number := self._numbers.get(tensor)) is None:
            number = self._numbers[tensor] = next(self._next)
        # Tensors made in inference mode do not count what is written to them, and take no gradient step either.
        return number, 0 if tensor.is_inference() else tensor._version


def _adapter_text(adapter: Adapter) -> str:
    return f"{adapter.name} {adapter.merged} {adapter.scaling} {adapter.modules}"
