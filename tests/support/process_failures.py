"""Processes that die, raise, stop or do something else while others share a cache with them."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from families import FAMILIES, prompts
from press_runs import ids_of

import pikv_hf.layer.attend
from pikv_hf import PiKVCache
from pikv_hf.layer.layer_part import LayerPart
from pikv_hf.scheduling.growth_limit import BudgetError

#: Seconds; long enough for four groups at once on two cores, as the others wait only where nothing comes at all.
TIMEOUT = 8.0
SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 8}


@dataclasses.dataclass(frozen=True)
class Failure:
    """How many processes there are, and what each runs: it gets its rank."""

    world: int
    run: Callable[[int], Any]


def observed(work: Callable[[], Any]) -> dict[str, Any]:
    """Return what was raised, and after how many seconds."""
    began = time.perf_counter()
    result: dict[str, Any] = {"error": "", "text": "", "notes": [], "value": None}
    try:
        result["value"] = work()
    except Exception as error:
        result |= {"error": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", [])}
    return {**result, "seconds": time.perf_counter() - began}


def generate(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate 12 tokens."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": 12, "do_sample": False, **options})


def shared(model: Any, **options: Any) -> PiKVCache:
    """Return a cache of all processes."""
    return PiKVCache.for_model(model, process_group="world", timeout=TIMEOUT, **{**SMALL, **options})


def at_step(number: int, action: Callable[[], Any]) -> Callable[..., None]:
    """Return a hook that acts in a call of a module, counted from the prompt's 0."""
    calls = iter(range(1 << 30))

    def hook(*_: Any) -> None:
        if next(calls) == number:
            action()

    return hook


def raises(error: Exception) -> Callable[..., Any]:
    """Return a function that raises."""

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


def in_hook(rank: int, action: Callable[[], Any]) -> Any:
    """Rank 1 does something between two layers of its third step."""
    model = FAMILIES["qwen3_moe"].build()
    if rank == 1:
        model.model.layers[1].register_forward_hook(at_step(3, action))
    return observed(lambda: generate(model, shared(model), ids_of(60)))


def raising_and_staying(rank: int) -> Any:
    """Rank 1's hook raises, but its process lives on, and so do its connections."""
    result = in_hook(rank, raises(RuntimeError("a hook's own")))
    if rank == 1:
        time.sleep(TIMEOUT + 2)
    return result


def stopping(rank: int) -> Any:
    """Rank 1 generates fewer tokens and does other things."""
    model = FAMILIES["qwen3_moe"].build()
    result = observed(lambda: generate(model, shared(model), ids_of(60), max_new_tokens=4 if rank else 12))
    if rank == 1:
        time.sleep(TIMEOUT + 2)
    return result


def patched(rank: int, target: Any, name: str, error: Exception, calls: int, again: bool = False) -> Any:
    """A function of the cache raises on rank 1 after some calls; `again`: all then use a new cache."""
    model = FAMILIES["qwen3_moe"].build()
    whole, counter = getattr(target, name), iter(range(1 << 30))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(counter) >= calls:
            raise error
        return whole(*args, **kwargs)

    with mock.patch.object(target, name, failing) if rank == 1 else mock.patch.object(target, name, whole):
        result = observed(lambda: generate(model, shared(model), ids_of(60)))
    result["stayed"] = time.perf_counter()
    if again:
        result["again"] = observed(lambda: generate(model, shared(model), ids_of(60)))
        result["expected"] = generate(model, PiKVCache.for_model(model, **SMALL), ids_of(60))
    elif rank == 1:
        # That others end sooner is not for want of this process.
        time.sleep(TIMEOUT + 2)
    return result


def other_inputs(rank: int, ids: Callable[[int], torch.Tensor], last: int = 1, **options: Any) -> Any:
    """The last rank is given something else."""
    model = FAMILIES["mixtral"].build()
    return observed(lambda: generate(model, shared(model), ids(rank == last), **options))


def one_token_changed(is_other: bool) -> torch.Tensor:
    """Five hundred tokens, one of them another, which makes the model say the same at first."""
    ids = ids_of(500)
    if is_other:
        ids[0, 250] = (ids[0, 250] + 7) % 180 + 3
    return ids


def other_seed(rank: int) -> Any:
    """Ranks sample with seeds of their own."""
    model = FAMILIES["qwen3_moe"].build()
    torch.manual_seed(rank)
    return observed(lambda: generate(model, shared(model), ids_of(60), do_sample=True, max_new_tokens=24))


def other_weights(rank: int) -> Any:
    """Ranks have different models."""
    model = FAMILIES["qwen3_moe"].build(seed=rank)
    return observed(lambda: generate(model, shared(model), ids_of(60)))


def other_rows_later(rank: int) -> Any:
    """Rank 1 asks for other rows in the midst of a generation."""
    model = FAMILIES["qwen3_moe"].build()
    cache = shared(model)

    def work() -> None:
        with torch.no_grad():
            model(ids_of(60), past_key_values=cache)
            model(torch.tensor([[5]]), past_key_values=cache)
            if rank == 1:
                cache.batch_repeat_interleave(3)
            for step in range(3):
                model(torch.full((3 if rank == 1 else 1, 1), 6 + step), past_key_values=cache)

    return observed(work)


def same_error_everywhere(rank: int) -> Any:
    """A call that is wrong in all processes harms none: the cache goes on."""
    model = FAMILIES["qwen3_moe"].build()
    cache = shared(model)
    with torch.no_grad():
        model(ids_of(60), past_key_values=cache)
        wrong = observed(lambda: model(ids_of(1, batch=2), past_key_values=cache))
        right = observed(lambda: model(ids_of(1), past_key_values=cache).logits)
        single = PiKVCache.for_model(model, **SMALL)
        model(ids_of(60), past_key_values=single)
        expected = model(ids_of(1), past_key_values=single).logits
    return {**right, "wrong": wrong, "expected": expected}


def odd_numbers(rank: int, kind: str) -> Any:
    """Nothing to worry about: rows of padding alone, zeros, NaN, bfloat16, one row."""
    model = FAMILIES["qwen3_moe"].build()
    inputs = prompts()
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    elif kind == "nan":
        # In one row alone.
        model.model.embed_tokens.weight.data[3] = torch.nan
        inputs["input_ids"][1, -5] = 3
    elif kind == "zeros":
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data.zero_()
            layer.self_attn.k_norm.weight.data.zero_()
    elif kind == "padding":
        inputs["attention_mask"][0, :-1] = 0
    expected = model.generate(
        **inputs, past_key_values=PiKVCache.for_model(model, **SMALL), max_new_tokens=12, do_sample=False
    )
    result = observed(
        lambda: model.generate(**inputs, past_key_values=shared(model), max_new_tokens=12, do_sample=False)
    )
    return {**result, "expected": expected}


FAILURES: dict[str, Failure] = {
    "exits": Failure(3, functools.partial(in_hook, action=lambda: os._exit(9))),
    "killed": Failure(2, functools.partial(in_hook, action=lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "raises": Failure(3, functools.partial(in_hook, action=raises(RuntimeError("a hook's own")))),
    "stays": Failure(3, raising_and_staying),
    "stops": Failure(2, stopping),
    "budget": Failure(3, lambda rank: patched(rank, LayerPart, "enforce", BudgetError("its own budget"), 6)),
    "memory-error": Failure(2, lambda rank: patched(rank, LayerPart, "append", MemoryError("its own memory"), 25)),
    "attends": Failure(
        3,
        lambda rank: patched(
            rank, pikv_hf.layer.attend, "attend_pages", ValueError("its own attention"), 7, again=True
        ),
    ),
    "again": Failure(2, lambda rank: patched(rank, LayerPart, "enforce", BudgetError("its own budget"), 6, again=True)),
    "prompt": Failure(3, functools.partial(other_inputs, ids=lambda other: ids_of(60, seed=2 if other else 1), last=2)),
    "prompt-one-token": Failure(2, functools.partial(other_inputs, ids=one_token_changed)),
    "prompt-length": Failure(2, functools.partial(other_inputs, ids=lambda other: ids_of(61 if other else 60))),
    "prompt-rows": Failure(2, functools.partial(other_inputs, ids=lambda other: ids_of(60, batch=2 if other else 1))),
    "prompt-chunks": Failure(
        2, functools.partial(other_inputs, ids=lambda other: ids_of(75 if other else 60), prefill_chunk_size=40)
    ),
    "rows-later": Failure(2, other_rows_later),
    "seed": Failure(2, other_seed),
    "weights": Failure(2, other_weights),
    "everywhere": Failure(2, same_error_everywhere),
    **{
        f"odd-{kind}": Failure(2, functools.partial(odd_numbers, kind=kind))
        for kind in ("padding", "nan", "zeros", "bfloat16")
    },
}
