"""Say what is evaluated: a kind of cache, and perhaps a press that compresses it."""

from dataclasses import dataclass
from typing import Any

from pikv_hf.eval.runner.caches import CacheFactory
from pikv_hf.eval.runner.presses import PressFactory
from pikv_hf.eval.runner.refusals import MODELS, PRESSES


@dataclass(frozen=True, slots=True)
class Method:
    """A cache with or without a press."""

    cache: CacheFactory
    press: PressFactory | None

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

    @property
    def chosen_packages(self) -> tuple[str, ...]:
        """Packages whose errors say that the user chose what does not go together.

        With a cache of this project an error within transformers may be this project's own.
        """
        return PRESSES if self.cache.ours else (*PRESSES, *MODELS)

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
