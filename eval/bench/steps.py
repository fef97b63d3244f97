"""Time decoding steps of whole models on several caches in turn, and prompts: `pikv bench steps`."""

import copy
import dataclasses
import functools
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.kernels.dispatch import choose

from ..errors import InputError
from .decode import Timing, geometry_model, timed
from .largest_tensor import Largest, largest_of_calls
from .press_prefill import median_ratio
from .step_caches import WHOLE, Prompt, bytes_of, empty, filled

#: Rounds that pay for allocations and for compiling, and are not counted; and the least that are.
WARM, LEAST = 3, 5

#: Steps whose tensors are looked at: a page of 32 tokens becomes full within them.
WATCHED = 33


def small_model() -> Any:
    """Return a random Llama of the shape of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1 << 18,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@dataclasses.dataclass(frozen=True)
class StepCase:
    """What is timed.

    Attributes
    ----------
    model : callable
        Makes the model.
    contexts : tuple of int
        Cached tokens, unless others are asked for.
    caches : tuple of str
        As :mod:`.step_caches` names them, unless others are asked for.
    rows : int
        Of the prompt.
    ragged : bool
        Whether these have different lengths, and padding on the left.
    beams : int
        Rows made of each row of the prompt, and reordered after each step.
    prompt : bool
        Whether a prompt is read, instead of decoding after one.
    """

    model: Callable[[], Any]
    contexts: tuple[int, ...]
    caches: tuple[str, ...]
    rows: int = 1
    ragged: bool = False
    beams: int = 1
    prompt: bool = False


_two_layers = functools.partial(geometry_model, layers=2)
_shares = "press:0.25", "kept:0.25", "press:0.0625", "kept:0.0625"
CASES = {
    "geometry": StepCase(_two_layers, (1024, 8192, 32768, 131072), ("dynamic", "exact", "int8", "int4", *_shares)),
    "small": StepCase(small_model, (1024, 4096, 16384), ("dynamic", "exact", "int4", "press:0.125")),
    "ragged": StepCase(_two_layers, (1024, 8192), ("dynamic", "exact", "press:0.25"), rows=8, ragged=True),
    "beams": StepCase(_two_layers, (1024, 8192), ("dynamic", "press:0.25"), beams=4),
    "prefill": StepCase(_two_layers, (8192,), ("dynamic", "exact", "int4"), prompt=True),
}


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Steps of one cache.

    Attributes
    ----------
    case : str
        Of :data:`CASES`.
    tokens, rows : int
        Cached tokens of the longest row when the steps begin, and rows.
    cache : str
        As :mod:`.step_caches` names them.
    timing : Timing
        Seconds per step, or per prompt until its tokens are stored.
    to_exact, to_dynamic, to_kept : float or None
        Median, over rounds, of its time over that of exact `PiKVCache`, of `DynamicCache`, and of a `DynamicCache` of
        the same share of the tokens; None where that was not timed.
    kv_bytes : int
        Live bytes of the cache after the steps.
    bytes_to_dynamic : float or None
        The same over `DynamicCache`'s.
    max_difference : float or None
        Largest absolute difference of logits from `DynamicCache`'s, of a cache that should have none.
    temporary, grown : Largest or None
        The largest tensor that was made in :data:`WATCHED` more steps, one of a `DynamicCache`, and was gone after its
        step; and the largest that was not: a cache that has grown, by copying itself. None for a prompt.
    widths : dict or None
        What PiKVPress decided: shares of tokens by bits per number, 0 for evicted ones.
    kernels : str
        The implementation of the CPU's kernels that was chosen.
    """

    case: str
    tokens: int
    rows: int
    cache: str
    timing: Timing
    to_exact: float | None
    to_dynamic: float | None
    to_kept: float | None
    kv_bytes: int
    bytes_to_dynamic: float | None
    max_difference: float | None
    temporary: Largest | None
    grown: Largest | None
    widths: dict[str, float] | None
    kernels: str


class Contender(Protocol):
    """A cache that takes turns."""

    cache: Any

    def __call__(self, number: int) -> tuple[float, torch.Tensor]:
        """Take a turn, whose number says what is read; return its seconds and logits."""


class Decoding:
    """Takes decoding steps with a cache."""

    def __init__(self, model: Any, cache: Any, prompt: Prompt, beams: int) -> None:
        self.model, self.cache, self.beams, self.valid = model, cache, beams, prompt.valid
        self.rows = beams * prompt.layers[0][0].shape[0]
        if beams > 1:
            cache.batch_repeat_interleave(beams)

    def __call__(self, number: int) -> tuple[float, torch.Tensor]:
        """Read a random token in each row, and reorder beams."""
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.model.config.vocab_size, (self.rows, 1), generator=draw)
        order = torch.randint(0, self.beams, (self.rows,), generator=draw) if self.beams > 1 else None
        return timed(self._step, ids, order, **self._mask())

    def _mask(self) -> dict[str, torch.Tensor]:
        """Return what `generate` gives a model for rows with padding; a cache of fewer tokens has its last columns."""
        if self.valid is None:
            return {}
        self.valid = torch.nn.functional.pad(self.valid, (0, 1), value=True)
        mask = self.valid[:, -self.cache.get_seq_length() - 1 :].long()
        return {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}

    def _step(self, ids: torch.Tensor, order: torch.Tensor | None, **mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, **cache_argument(self.cache), **mask).logits
        if order is not None:
            self.cache.reorder_cache(order)
        return logits


class Reading:
    """Reads a prompt, each time into a new cache."""

    def __init__(self, name: str, model: Any, tokens: int) -> None:
        self.name, self.model, self.tokens = name, model, tokens

    def __call__(self, number: int) -> tuple[float, torch.Tensor]:
        """Read random tokens."""
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.model.config.vocab_size, (1, self.tokens), generator=draw)
        self.cache = empty(self.name, self.model)
        return timed(self._read, ids)

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, **cache_argument(self.cache), logits_to_keep=1).logits
        # The last layer stores its tokens when they are asked for.
        bytes_of(self.cache)
        return logits


def run_steps(
    cases: Sequence[str], contexts: Sequence[int] = (), caches: Sequence[str] = (), seconds: float = 20.0, turn: int = 1
) -> Iterator[StepTiming]:
    """Time steps of several caches in turn, each on a copy of the model that shares its weights.

    Each round every cache takes its steps, in an order that is drawn anew; so the machine's moods hit all alike. A
    small cache has been driven out of the processor's caches by the others when its turn comes; alone it would be
    faster, which longer turns show.

    Parameters
    ----------
    cases : sequence of str
        Of :data:`CASES`.
    contexts : sequence of int
        Cached tokens; by default those of each case.
    caches : sequence of str
        As :mod:`.step_caches` names them; by default those of each case.
    seconds : float
        Time to spend on the steps of each case and context. At least :data:`LEAST` rounds are counted; and no more than
        lengthen the context by an eighth, or by 64 tokens.
    turn : int
        Steps that a cache takes in a row.

    Raises
    ------
    InputError
        At once, for a cache that reads no prompt, if one is to be read.
    """
    part = next((each for each in caches if each not in WHOLE), None)
    if part is not None and any(CASES[name].prompt for name in cases):
        raise InputError(
            f"--case prefill reads a prompt into {', '.join(WHOLE)}, got --cache {part}; choose other cases"
        )
    return _all_timings(cases, contexts, caches, seconds, turn)


@torch.no_grad()
def _all_timings(
    cases: Sequence[str], contexts: Sequence[int], caches: Sequence[str], seconds: float, turn: int
) -> Iterator[StepTiming]:
    for name in cases:
        case = CASES[name]
        torch.manual_seed(0)
        model = case.model()
        for tokens in contexts or case.contexts:
            yield from _timings(name, model, tokens, caches or case.caches, seconds, turn)
            # Caches and attached models refer to each other.
            gc.collect()


def _timings(
    name: str, model: Any, tokens: int, caches: Sequence[str], seconds: float, turn: int
) -> Iterator[StepTiming]:
    case = CASES[name]
    contenders, widths = _contenders(case, model, tokens, caches)
    most = 1 << 30 if case.prompt else max(64, tokens // 8) // turn
    spent, difference, taken = _rounds(contenders, seconds, turn, max(LEAST, most))
    sizes = {each: bytes_of(contender.cache) for each, contender in contenders.items()}
    for cache, contender in contenders.items():
        # A `DynamicCache` does the same in every step.
        watched = range(taken, taken + (WATCHED if isinstance(contender.cache, PiKVCache) else 1))
        temporary, grown = (None, None) if case.prompt else largest_of_calls(contender, watched)
        ratios = [
            None if other not in spent else median_ratio(spent[cache], spent[other])
            for other in ("exact", "dynamic", cache.replace("press:", "kept:"))
        ]
        yield StepTiming(
            case=name,
            tokens=tokens,
            rows=case.rows * case.beams,
            cache=cache,
            timing=Timing.of(spent[cache]),
            to_exact=ratios[0],
            to_dynamic=ratios[1],
            to_kept=ratios[2] if cache.startswith("press:") else None,
            kv_bytes=sizes[cache],
            bytes_to_dynamic=sizes[cache] / sizes["dynamic"] if "dynamic" in sizes else None,
            max_difference=difference if cache == "exact" and "dynamic" in sizes else None,
            temporary=temporary,
            grown=grown,
            widths=widths.get(cache),
            kernels=choose(torch.device("cpu"), compiled=True),
        )


def _contenders(
    case: StepCase, model: Any, tokens: int, caches: Sequence[str]
) -> tuple[dict[str, Contender], dict[str, dict[str, float]]]:
    """Return caches that can take turns, and the shares of widths in those that a press has compressed."""
    copies = {name: _copy_of(model) for name in caches}
    if case.prompt:
        return {name: Reading(name, copied, tokens) for name, copied in copies.items()}, {}
    prompt = Prompt.drawn(model.config, case.rows, tokens, case.ragged)
    contenders: dict[str, Contender] = {}
    widths = {}
    for name, copied in copies.items():
        cache, given = filled(name, copied, prompt)
        contenders[name] = Decoding(copied, cache, prompt, case.beams)
        if given is not None:
            widths[name] = given
    return contenders, widths


def _copy_of(model: Any) -> Any:
    """Return a model with the same weights that can be attached by itself."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _rounds(
    contenders: Mapping[str, Contender], seconds: float, turn: int, most: int
) -> tuple[dict[str, list[float]], float, int]:
    """Return each one's seconds, how far the exact cache was from `DynamicCache`, and how many turns all have taken."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    difference, shuffle = 0.0, random.Random(0)
    started = time.perf_counter()
    for number in range(WARM + most):
        if number == WARM:
            started = time.perf_counter()
        elif number >= WARM + LEAST and time.perf_counter() - started > seconds:
            break
        logits = {}
        for name in shuffle.sample(list(contenders), len(contenders)):
            for step in range(number * turn, (number + 1) * turn):
                took, logits[name] = contenders[name](step)
                if number >= WARM:
                    spent[name].append(took)
        if {"exact", "dynamic"} <= set(logits):
            difference = max(difference, float((logits["exact"] - logits["dynamic"]).abs().max()))
    return spent, difference, len(next(iter(spent.values()))) + WARM * turn
