"""Refuse results of a press that has changed nothing: they would be filed under a name that did not earn them."""

from collections.abc import Callable
from typing import Any

import torch

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.memory_meter import DynamicFootprint, stored_bytes
from pikv_hf.eval.runner.method import Subject
from pikv_hf.eval.runner.press_phases import PressPhases

#: Ids, mask and positions of a prompt, as the decoder is called with them.
Prompt = dict[str, torch.Tensor]


class PressEffect:
    """Compares a prompt's bytes with those of the same prompt without the press, where these may be the same.

    They cannot be where the cache holds less than `DynamicCache` would, unless a codec or quantisation did that; for
    that case the first prompt of a run is read once more, whatever it holds.

    Attributes
    ----------
    ratio : float
        What the press was asked to remove; with 0 nothing is checked, and neither for presses that act in answers.
    """

    def __init__(self, subject: Subject, footprint: DynamicFootprint) -> None:
        self.ratio = subject.method.ratio
        self._subject, self._footprint = subject, footprint
        self._first = True

    def check(self, cache: Any, kv_bytes: int, lengths: list[int], prompt: Callable[[], Prompt]) -> None:
        """Raise `InputError` if a press has changed nothing of a prompt.

        Parameters
        ----------
        cache : Any
            As the press left it; tokens may have been added.
        kv_bytes : int
            What it held before these.
        lengths : list of int
            Tokens of the prompt's rows.
        prompt : callable
            Returns the prompt.
        """
        if not self.ratio or PressPhases.of(self._subject.method.new_press()).answer:
            return
        first, self._first = self._first, False
        if not first and kv_bytes < sum(map(self._footprint.own_bytes, lengths)):
            return
        plain = self._subject.new_cache()
        with torch.no_grad():
            self._subject.model.model(**prompt(), **cache_argument(plain))
        if stored_bytes(plain) == kv_bytes and not self._shows_otherwise(cache, plain):
            method = self._subject.method
            raise InputError(
                f"{method.press and method.press.spec} at ratio {self.ratio:g} changed nothing: with it and without it "
                f"the {method.cache.label} holds {kv_bytes} bytes of {' + '.join(map(str, lengths))} tokens"
            )

    def _shows_otherwise(self, cache: Any, plain: Any) -> bool:
        """Return whether a press hides or changes tokens in a cache that frees none."""
        if self._subject.method.cache.ours:
            return False
        modules = self._subject.model.modules()
        if any(getattr(module, "masked_key_indices", None) is not None for module in modules):
            return True
        return not all(map(_same_tokens, cache.layers, plain.layers))


def _same_tokens(layer: Any, plain: Any) -> bool:
    """Return whether a layer begins with the keys and values of another; what keeps none tells nothing."""
    pairs = [(getattr(layer, name, None), getattr(plain, name, None)) for name in ("keys", "values")]
    return all(
        isinstance(theirs, torch.Tensor)
        and isinstance(ours, torch.Tensor)
        and torch.equal(ours[..., : theirs.shape[-2], :], theirs)
        for ours, theirs in pairs
    )
