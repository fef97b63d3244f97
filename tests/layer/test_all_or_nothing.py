"""Every operation changes all of a cache or nothing of it, whichever step of it fails.

Each step of an operation is made to fail, one after the other, on the same cache: it must be as it was, or the next
failure starts from something else. In the end nothing fails, and the operation does what it does on a cache that has
not been through this.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing_memory import FailingOnce
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer

SMALL = {"page_size": 4, "recent_window": 8, "sink_tokens": 2, "num_shards": 3, "rank": 4}
TOKENS, ROWS = 61, 2

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "int4": {"key_codec": "int4", "value_codec": "int4"},
    "lowrank": {"key_codec": "lowrank+int4", "value_codec": "lowrank"},
    "routed": {"routing": "page_bound", "key_codec": "int8", "value_codec": "int8"},
    "page_mass": {"routing": "page_mass", "value_codec": "int4"},
    "tiers": {"tiers": {"cpu": "16KiB", "disk": None}, "key_codec": "int4", "value_codec": "int4"},
    "devices": {"devices": ["cpu:0", "cpu:1"]},
    "balanced": {"placement": "balanced", "devices": ["cpu:0", "cpu:1"], "key_codec": "int4"},
    "budget": {"budget": 200, "scheduler": "pikv"},
    "joint": {"budget": 30},
    "forked": {"key_codec": "fp8"},
}


def kv(new: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, ROWS, 2, new, 16), generator=generator)
    return keys, values


def ids(new: int, rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 190, (rows, new), generator=torch.Generator().manual_seed(seed))


# Operations: what comes before, which does not fail, and what does


Prepare = Callable[[PiKVCache], None]
Operation = Callable[[PiKVCache], Any]


def nothing(cache: PiKVCache) -> None:
    pass


def until_page_ends(cache: PiKVCache) -> None:
    for step in range(4):
        if cache.layers[0].table.is_at_page_end:
            break
        decode(cache, step)
        cache.layers[0].state.reference_out = False


def chunk_waits(cache: PiKVCache) -> None:
    chunk(cache)


def pressed_chunk_waits(cache: PiKVCache) -> None:
    cache.layers[0].edits.begin_press()
    chunk(cache)
    chosen(cache)


def decode(cache: PiKVCache, seed: int = 0) -> Any:
    return cache.layers[0].update_from_attention(*kv(1, seed))


def chunk(cache: PiKVCache) -> Any:
    return cache.layers[0].update_from_attention(*kv(13))


def chosen(cache: PiKVCache) -> None:
    cache.layers[0].record_experts(ids(13).reshape(-1) % 8)


def keep(cache: PiKVCache) -> None:
    layer = cache.layers[0]
    generator = torch.Generator().manual_seed(3)
    layer.keep(torch.rand((ROWS, 2, layer.seen), generator=generator) < 0.6)


def assign(cache: PiKVCache) -> None:
    layer = cache.layers[0]
    keys, values = layer.dense()
    layer.keys, layer.values = keys[:, :, ::2].clone(), values[:, :, ::2].clone()


def save(cache: PiKVCache) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            cache.save(Path(folder) / "cache")
        except BaseException:
            assert not list(Path(folder).iterdir())
            raise


OPERATIONS: dict[str, tuple[Prepare, Operation]] = {
    "crop": (nothing, lambda cache: cache.crop(33)),
    "crop_pending": (chunk_waits, lambda cache: cache.crop(40)),
    "crop_draft": (nothing, lambda cache: cache.crop(-3)),
    "reorder": (nothing, lambda cache: cache.reorder_cache(torch.tensor([1, 1]))),
    "repeat": (nothing, lambda cache: cache.batch_repeat_interleave(2)),
    "select": (nothing, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    "keep": (nothing, keep),
    "assign": (nothing, assign),
    "decode": (nothing, decode),
    "decode_at_page_end": (until_page_ends, decode),
    "chunk": (nothing, chunk),
    "record_experts": (chunk_waits, chosen),
    "settle": (pressed_chunk_waits, lambda cache: cache.layers[0].settle()),
    "fork": (nothing, lambda cache: cache.fork()),
    "save": (nothing, save),
    "memory_report": (nothing, lambda cache: cache.memory_report()),
}


# What is compared


def contents(cache: PiKVCache) -> list[Any]:
    """Return what a cache holds, as a user can see it."""
    found: list[Any] = [cache.get_seq_length()]
    for layer in cache.layers:
        if isinstance(layer, PiKVLayer):
            found += [layer.seen, layer.state.evicted, layer.stored_mask(), *layer.dense()]
            found += [None if layer.pending is None else layer.pending.experts, layer.edits.awaits_press]
        else:
            found += [layer.get_seq_length(), layer.keys.clone(), layer.values.clone()]
    return found


def same(first: list[Any], second: list[Any]) -> bool:
    """Compare contents; decoding the same codes twice may round differently."""
    pairs = list(zip(first, second, strict=True))
    if any(torch.is_tensor(a) != torch.is_tensor(b) for a, b in pairs):
        return False
    return all(
        (a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)) if torch.is_tensor(a) else a == b
        for a, b in pairs
    )


def check_books(cache: PiKVCache) -> None:
    """Check that references, counts, positions and bytes agree."""
    for layer in cache.layers:
        for table in layer.store.tables() if isinstance(layer, PiKVLayer) else ():
            for pool_id, pool in table.pools.by_id().items():
                held = [np.zeros(0, dtype=np.int64)]
                for rows in table.pools.holders.values():
                    held += [sequence.pages(pool_id) for sequence in {id(row): row for row in rows}.values()]
                refcount = pool.allocator.refcount
                assert refcount.tolist() == np.bincount(np.concatenate(held), minlength=pool.capacity).tolist()
                counted = (pool.positions >= 0).sum(dim=1).numpy()
                assert counted[refcount > 0].tolist() == pool.count[refcount > 0].tolist()
                assert not pool._transactions
                assert not pool._wiped


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


@torch.no_grad()
def filled(model: Any, options: dict[str, Any], prepare: Prepare = nothing) -> PiKVCache:
    cache = PiKVCache.for_model(model, **SMALL, **options)
    model(ids(TOKENS), past_key_values=cache)
    for step in range(5):
        model(ids(1, seed=step), past_key_values=cache)
    cache.memory_report()
    if options is OPTIONS["forked"]:
        # Its pages are shared for as long as the cache lives.
        cache.older = cache.fork()
    prepare(cache)
    return cache


@torch.no_grad()
def next_logits(model: Any, cache: PiKVCache) -> torch.Tensor:
    cache.memory_report()
    cache.crop(cache.layers[1].get_seq_length())
    for layer in cache.layers:
        layer.state.reference_out = False
    return model(ids(3, rows=cache.layers[0].batch), past_key_values=cache).logits


def fail_everywhere(
    make: Callable[[], PiKVCache], operation: Operation, error: BaseException, step: Callable[[int], int]
) -> PiKVCache:
    """Let each step of an operation fail in turn; return the cache once nothing has failed."""
    done, settled, cache = make(), make(), make()
    operation(done)
    after = contents(done)
    # Moving to the shards, and packing, what has left the window is due before anything else, and may be done already.
    settled.memory_report()
    states, number = [contents(cache), contents(settled)], 0
    while True:
        failing = FailingOnce(number, copy.copy(error))
        raised = False
        try:
            with failing.watching():
                operation(cache)
        except type(error):
            raised = True
        assert raised <= failing.has_failed
        check_books(cache)
        if not failing.has_failed:
            assert same(contents(cache), after)
            break
        now = contents(cache)
        if raised and any(same(now, before) for before in states):
            number += step(number)
            continue
        # Done all the same: memory that could not be given back is kept. Only an interruption is told of then.
        assert same(now, after), f"step {number} failed, and something has changed"
        assert not raised or isinstance(error, KeyboardInterrupt), f"step {number} failed, and all is done"
        cache, number = make(), number + step(number)
    return cache


MEMORY, CTRL_C = torch.OutOfMemoryError("the test's own"), KeyboardInterrupt()


def each_step_may_fail(model: Any, name: str, options: str, error: BaseException, density: int) -> None:
    """See :func:`fail_everywhere`: all of the first `density` steps, and of later ones a sample."""
    prepare, operation = OPERATIONS[name]
    cache = fail_everywhere(
        lambda: filled(model, OPTIONS[options], prepare), operation, error, lambda number: 1 + number // density
    )
    untouched = filled(model, OPTIONS[options], prepare)
    operation(untouched)
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, untouched), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [MEMORY, CTRL_C], ids=["memory", "ctrl-c"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_some_steps_may_fail(model: Any, name: str, error: BaseException) -> None:
    each_step_may_fail(model, name, "exact", error, 4)


@pytest.mark.parametrize("error", [MEMORY, CTRL_C], ids=["memory", "ctrl-c"])
@pytest.mark.parametrize("name", ["crop", "crop_draft", "repeat", "select", "decode_at_page_end", "fork", "save"])
def test_some_steps_of_layers_that_decide_together_may_fail(model: Any, name: str, error: BaseException) -> None:
    each_step_may_fail(model, name, "joint", error, 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_each_step_may_fail(model: Any, number: int) -> None:
    """Each operation with two of the options, one for each kind of error."""
    names, options = list(OPERATIONS), list(OPTIONS)
    each_step_may_fail(model, names[number], options[number % len(options)], MEMORY, 24)
    each_step_may_fail(model, names[number], options[(3 * number + 2) % len(options)], CTRL_C, 24)


@pytest.mark.parametrize("options", ["exact", pytest.param("int4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_call_of_the_model_that_fails_is_taken_back_by_a_crop(model: Any, options: str) -> None:
    """Layers before the one that fails have the tokens."""

    def call(cache: PiKVCache) -> None:
        length = cache.get_seq_length()
        try:
            model(ids(1), past_key_values=cache)
            cache.memory_report()
        except BaseException:
            cache.crop(length)
            raise

    def make() -> PiKVCache:
        return filled(model, OPTIONS[options])

    cache = fail_everywhere(make, call, MEMORY, lambda number: 1 + number // 4)
    call(untouched := make())
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, untouched), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["crop_draft", "reorder", "repeat", "select"])
@torch.no_grad()
def test_sliding_layers_of_transformers_change_with_the_others(name: str) -> None:
    model = FAMILIES["gpt_oss"].build()

    def make() -> PiKVCache:
        cache = PiKVCache.for_model(model, **SMALL)
        model(ids(15), past_key_values=cache)
        cache.memory_report()
        return cache

    for error in (MEMORY, CTRL_C):
        fail_everywhere(make, OPERATIONS[name][1], error, lambda number: 1 + number // 12)
