"""Time what presses add to a prefill on `PiKVCache`, in turn with no press and with `DynamicCache`."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.config import Placement
from pikv_hf.eval.bench.decode import Timing, geometry_model, timed
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.models import load_model, position_limit
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.eval.tasks.ruler import Haystack
from pikv_hf.integration.model_modules import find_expert_routers

#: Presses of this project as `pikv eval` takes them.
PRESSES = ("QueryAwarePress", "PyramidPress", "DuoPress", "LoRAPress", "ExpertPress", "PiKVPress")
NONE = "none"


@dataclasses.dataclass(frozen=True)
class PressTiming:
    """A prefill with one press.

    Attributes
    ----------
    press : str
        As `pikv eval` takes it, or `none`.
    ratio : float
        Share that it was asked to remove.
    tokens : int
        Of the prompt.
    pikv : Timing
        Seconds per prompt on `PiKVCache`.
    to_none : float
        Median, over rounds, of its time over that of `PiKVCache` without a press: 1.1 is 10% slower.
    to_dynamic : float
        The same over `DynamicCache` without a press, on the unattached model.
    kv_bytes : int
        Live bytes of the cache afterwards.
    """

    press: str
    ratio: float
    tokens: int
    pikv: Timing
    to_none: float
    to_dynamic: float
    kv_bytes: int


def run_presses(
    tokens: int = 8192,
    ratio: float = 0.75,
    repeats: int = 5,
    presses: Sequence[str] = PRESSES,
    model: str | None = None,
) -> Iterator[PressTiming]:
    """Time a prompt through a model, with each press and without one.

    Parameters
    ----------
    tokens : int
        Length of the prompt.
    ratio : float
        Share that each press removes.
    repeats : int
        Rounds; in each, every method reads the prompt once, in an order that turns from round to round. One more round
        before them, which is not counted, pays for what a press does once per model, such as `DuoPress` finding heads.
    presses : sequence of str
        As `pikv eval` takes them.
    model : str, optional
        Reads the bundled essays, as often as fills the prompt; by default a random model of two layers reads random
        tokens.

    Raises
    ------
    InputError
        At once, for a press or ratio that cannot be used, and for a model without so many positions.
    """
    made = {name: press_factory(name, ratio).make() for name in presses}
    if model is None:
        return _rounds(geometry_model(layers=2), None, tokens, ratio, repeats, made)
    loaded, tokenizer = load_model(model)
    limit = position_limit(loaded)
    if limit is not None and tokens > limit:
        raise InputError(f"--tokens {tokens:,} do not fit the {limit:,} positions of {model}")
    return _rounds(loaded, tokenizer, tokens, ratio, repeats, made)


@torch.no_grad()
def _rounds(
    model: Any, tokenizer: Any, tokens: int, ratio: float, repeats: int, presses: Mapping[str, Any]
) -> Iterator[PressTiming]:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens)) if tokenizer is None else _essays(tokenizer, tokens)
    calls: dict[str, Callable[[], Any]] = {
        "dynamic": functools.partial(_dynamic, model, ids),
        NONE: functools.partial(_paged, model, ids),
    }
    calls |= {name: functools.partial(_paged, model, ids, press) for name, press in presses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    sizes = dict.fromkeys(calls, 0)
    for round_number in range(repeats + 1):
        for name in _turned(list(calls), round_number):
            spent, sizes[name] = calls[name]()
            seconds[name].append(spent)
    counted = {name: every[1:] for name, every in seconds.items()}
    for name in (NONE, *presses):
        to_none, to_dynamic = (median_ratio(counted[name], counted[other]) for other in (NONE, "dynamic"))
        asked = 0.0 if name == NONE else ratio
        yield PressTiming(name, asked, tokens, Timing.of(counted[name]), to_none, to_dynamic, sizes[name])


def _essays(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Return so many tokens of the bundled essays, `(1, T)`, from the beginning again at their end."""
    ids = tokenizer(Haystack.bundled().text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


def _turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of seconds that were measured in turn."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def _dynamic(model: Any, ids: torch.Tensor) -> tuple[float, int]:
    cache = DynamicCache(config=model.config)
    spent, _ = timed(model, ids, **cache_argument(cache), logits_to_keep=1)
    return spent, dense_bytes(cache)


def dense_bytes(cache: DynamicCache) -> int:
    """Return the bytes of the keys and values of a `DynamicCache`."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _paged(model: Any, ids: torch.Tensor, press: Any = None) -> tuple[float, int]:
    """Return the seconds of a prompt, until its tokens are stored, and the cache's bytes."""
    # Attaching is set-up, not prefill; after the block the model runs transformers' own SDPA.
    placement: Placement = "expert" if find_expert_routers(model) else "hash"
    with attach(model, placement):
        return timed(_read, model, ids, PiKVCache.for_model(model, placement=placement), press)


def _read(model: Any, ids: torch.Tensor, cache: PiKVCache, press: Any) -> int:
    with nullcontext() if press is None else press(model):
        model(ids, **cache_argument(cache), logits_to_keep=1)
    # The last layer stores its tokens when they are asked for.
    return cache.nbytes
