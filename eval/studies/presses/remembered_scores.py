"""Score a layer's tokens once for all presses that score them alike: at every ratio, alone and within others."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pikv_hf.presses.press_base import KVPRESS

#: Presses whose scores do not depend on their ratio.
_ALIKE = (
    "CURPress",
    "CapPress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KnormPress",
    "LagKVPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "RandomPress",
    "SnapKVPress",
    "TOVAPress",
)
#: Attributes by which presses hold others.
_INNER = ("press", "base_press", "_leverage_press", "_non_causal_press")


class RememberedScores:
    """Remembers what was scored since it last forgot.

    Scores are told apart by the press's class and options and by which part of which tensors was scored.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[torch.Tensor, Any, Any]] = {}

    def forget(self) -> None:
        """Begin with another layer."""
        self._known.clear()

    @contextmanager
    def of(self, presses: Iterable[Any]) -> Generator[None, None, None]:
        """Have these presses, and those within them, score nothing twice within the block."""
        scorers = [each for press in presses for each in _all_of(press) if type(each).__name__ in _ALIKE]
        norms = KVPRESS.CriticalKVPress.vwl1norm
        for scorer in scorers:
            scorer.score = self._remembering(type(scorer).score.__get__(scorer), _named(scorer))
        KVPRESS.CriticalKVPress.vwl1norm = staticmethod(self._remembering(norms, "vwl1norm"))
        try:
            yield
        finally:
            self.forget()
            KVPRESS.CriticalKVPress.vwl1norm = staticmethod(norms)
            for scorer in scorers:
                del scorer.score

    def _remembering(self, function: Callable[..., torch.Tensor], name: Any) -> Callable[..., torch.Tensor]:
        def remembered(*args: Any, **kwargs: Any) -> torch.Tensor:
            key = name, *map(_place, [*args, *kwargs.values()])
            if key not in self._known:
                # What was scored is kept, too: a tensor that is gone leaves its place to another one.
                self._known[key] = function(*args, **kwargs), args, kwargs
            # Presses around it write into what they are given.
            return self._known[key][0].clone()

        return remembered


def _all_of(press: Any) -> Iterator[Any]:
    yield press
    for name in _INNER:
        if name in vars(press):
            yield from _all_of(getattr(press, name))


def _named(press: Any) -> tuple[Any, ...]:
    options = {field.name: getattr(press, field.name) for field in dataclasses.fields(press)}
    return type(press).__name__, *sorted((k, repr(v)) for k, v in options.items() if k != "compression_ratio")


def _place(value: Any) -> Any:
    """Return what tells an argument from another one while a layer is pressed."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value._version
    if isinstance(value, dict):
        return tuple((key, _place(each)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_place, value))
    return id(value)
