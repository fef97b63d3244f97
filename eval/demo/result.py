"""What the demo found: a measurement of each cache, and how the exact cache compares with `DynamicCache`."""

import dataclasses
from typing import Any

from pikv_hf.eval.demo.measure import Measurement
from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.demo.token_spread import LayerSpread
from pikv_hf.reports.cache_stats import CacheStats


@dataclasses.dataclass(frozen=True, slots=True)
class Disagreement:
    """The answers to question number `question` differ from token number `token` on, both from 0."""

    question: int
    token: int


@dataclasses.dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    model, model_type, dtype, device : str
        Name and kind of the model, and where it ran.
    parameters : int
        Of the model.
    options : DemoOptions
        What was asked for.
    versions : dict of str to str
        Of pikv_hf, torch and transformers.
    context_tokens : int
        Tokens of the context, which is read once.
    questions : tuple of str
        As asked.
    subjects : tuple of str
        What each asks for, in fewer words where there are some.
    expected : tuple of str or None
        Right answers, where known.
    dynamic, pikv, int4 : Measurement
        `DynamicCache`, the exact `PiKVCache`, and one with int4 codecs.
    press : Measurement or None
        A `PiKVCache` of which PiKVPress left a sixteenth.
    press_missing : str or None
        Why there is no `press`.
    logit_difference : float
        Largest absolute difference of any logit between `pikv` and `dynamic`, up to where two answers part.
    disagreements : tuple of Disagreement
        Where the answers of `pikv` and `dynamic` differ.
    spread : tuple of LayerSpread
        Where PiKV put the context's tokens; paged layers only.
    per_device : dict of str to int
        Bytes of PiKV's cache by device, with what it shares with all questions' copies.
    stats : CacheStats
        What PiKV's routing read, its scheduler evicted and its tiers moved, over all questions' copies.
    """

    model: str
    model_type: str
    dtype: str
    device: str
    parameters: int
    options: DemoOptions
    versions: dict[str, str]
    context_tokens: int
    questions: tuple[str, ...]
    subjects: tuple[str, ...]
    expected: tuple[str | None, ...]
    dynamic: Measurement
    pikv: Measurement
    int4: Measurement
    press: Measurement | None
    press_missing: str | None
    logit_difference: float
    disagreements: tuple[Disagreement, ...]
    spread: tuple[LayerSpread, ...]
    per_device: dict[str, int]
    stats: CacheStats

    @property
    def caches(self) -> list[Measurement]:
        """The caches that were measured, in the order of the tables."""
        measured = [self.dynamic, self.pikv, self.int4, self.press]
        return [cache for cache in measured if cache is not None]

    @property
    def agree(self) -> bool:
        """Whether `DynamicCache` and the exact `PiKVCache` gave the same tokens for every question."""
        return not self.disagreements

    @property
    def judged(self) -> bool:
        """Whether the right answers are known."""
        return None not in self.expected

    def describe_disagreement(self) -> str:
        """Return one line about where the answers part."""
        first = self.disagreements[0]
        hint = "" if self.dtype == "float32" else f"; rounding of {self.dtype} can do that, --dtype float32 tells"
        return (
            f"the caches' answers differ for {len(self.disagreements)} of {len(self.questions)} questions, first for "
            f"question {first.question + 1} at token {first.token + 1}{hint}"
        )

    def describe_answers(self, cache: Measurement) -> str:
        """Return how many of a cache's answers are right, or the same as `DynamicCache`'s if that is not known."""
        return f"{self._good_answers(cache)} of {len(cache.answers)}"

    def _good_answers(self, cache: Measurement) -> int:
        if self.judged:
            return sum(bool(answer.right) for answer in cache.answers)
        pairs = zip(cache.answers, self.dynamic.answers, strict=True)
        return sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        options = dataclasses.asdict(self.options)
        paths = {name: options[name] for name in ("text", "record_trace")}
        return {
            **dataclasses.asdict(self),
            "options": {**options, **{name: None if path is None else str(path) for name, path in paths.items()}},
            "agree": self.agree,
        }
