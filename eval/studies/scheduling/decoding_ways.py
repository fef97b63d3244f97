"""Ways to keep what comes token by token: caches, and presses that stay active and decide again and again."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.presses import PiKVPress, QueryAwarePress

#: Of paged caches: nothing but the budget decides what stays.
OPTIONS: dict[str, Any] = {"placement": "hash", "num_shards": 1, "recent_window": 0, "sink_tokens": 0}


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """How tokens are kept.

    Attributes
    ----------
    cache : callable
        From a model and a budget in tokens to an empty cache.
    press : callable
        From a budget in tokens and the tokens between two decisions to what is active all the time, called with the
        model.
    """

    cache: Callable[[Any, int], Any]
    press: Callable[[int, int], Any] = lambda budget, every: contextlib.nullcontext


def _dynamic(model: Any, budget: int) -> DynamicCache:
    return DynamicCache(config=model.config)


def _paged(model: Any, budget: int) -> PiKVCache:
    return PiKVCache.for_model(model, **OPTIONS)


def _budgeted(scheduler: str) -> Callable[[Any, int], PiKVCache]:
    return lambda model, budget: PiKVCache.for_model(model, budget=budget, scheduler=scheduler, **OPTIONS)


def _decoding(press: Callable[[int], str]) -> Callable[[int, int], Any]:
    """Return `DecodingPress` around a press: what it keeps leaves room for the tokens until it is asked again."""

    def made(budget: int, every: int) -> Any:
        options = f"compression_interval={every}, hidden_states_buffer_size={every}, target_size={budget - every}"
        return press_factory(f"DecodingPress({press(every)}, {options})").make()

    return made


WAYS: dict[str, Way] = {
    "full": Way(_dynamic),
    "budget, joint": Way(_budgeted("joint")),
    "budget, pikv": Way(_budgeted("pikv")),
    "PiKVPress": Way(_paged, lambda budget, every: PiKVPress(budget=budget, compression_interval=every)),
    "QueryAwarePress": Way(_paged, lambda budget, every: QueryAwarePress(budget=budget, compression_interval=every)),
    "DecodingPress(KeyDiffPress)": Way(_dynamic, _decoding(lambda _: "KeyDiffPress")),
    "DecodingPress(TOVAPress)": Way(_dynamic, _decoding(lambda _: "TOVAPress")),
    "DecodingPress(SnapKVPress)": Way(_dynamic, _decoding(lambda every: f"SnapKVPress(window_size={every // 2})")),
    "DecodingPress(StreamingLLMPress)": Way(_dynamic, _decoding(lambda _: "StreamingLLMPress")),
}
