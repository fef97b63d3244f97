"""What is evaluated: a kind of cache, and perhaps a press that compresses it."""

from dataclasses import dataclass
from typing import Any

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.caches import CacheFactory
from pikv_hf.eval.runner.presses import PressFactory


@dataclass(frozen=True, slots=True)
class Method:
    """A cache with or without a press.

    Raises
    ------
    InputError
        If the press cannot compress this kind of cache.
    """

    cache: CacheFactory
    press: PressFactory | None

    def __post_init__(self) -> None:
        if self.press is not None and not self.cache.takes_press:
            raise InputError(
                f"{self.press.spec} assigns layer.keys and layer.values, which the cache {self.cache.spec!r} does not "
                "let it; use the dynamic cache"
            )

    @property
    def ratio(self) -> float:
        """The press's ratio, 0 without one."""
        return 0.0 if self.press is None else self.press.ratio

    @property
    def label(self) -> str:
        """For tables and plots: the cache, or the press and a cache other than DynamicCache."""
        if self.press is None:
            return self.cache.label
        return self.press.label if self.cache.spec == "dynamic" else f"{self.press.label} on {self.cache.label}"

    def new_press(self) -> Any:
        """Return a fresh press or None."""
        return None if self.press is None else self.press.make()


@dataclass(frozen=True, slots=True)
class Subject:
    """A method on a model."""

    model: Any
    tokenizer: Any
    method: Method

    def new_cache(self) -> Any:
        """Return a fresh cache."""
        return self.method.cache.make(self.model)
