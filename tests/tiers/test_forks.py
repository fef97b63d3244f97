"""os.fork() in the middle of a generation with pages on disk: every process goes on with the right tokens."""

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking_runs import Fork, tokens_of_all
from hypothesis import given, settings
from hypothesis import strategies as st
from tiered_runs import LENGTH, STEPS, files_of, generate, half, pools_of

from pikv_hf import PiKVCache
from pikv_hf.tiers import tiered_pool
from pikv_hf.tiers.file_records import Records

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    # The next layer's pages are read ahead.
    "routed": {"routing": "adaptive", "max_pages": 100},
    "budget": {"scheduler": "pikv"},
}


@pytest.fixture(scope="module")
def limits(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    return half(model, ids)


@pytest.fixture(scope="module")
def alone(model: Any, ids: torch.Tensor, expected: torch.Tensor, limits: dict[str, Any]) -> dict[str, Any]:
    """What one process gets that does not fork; where attention is exact, what `DynamicCache` gives."""
    tokens = {kind: generate(model, ids, PiKVCache.for_model(model, **limits, **OPTIONS[kind])) for kind in OPTIONS}
    assert torch.equal(tokens["exact"], expected)
    return {kind: each.tolist() for kind, each in tokens.items()}


def cache_on_disk(model: Any, limits: dict[str, Any], folder: Path, kind: str = "exact") -> PiKVCache:
    return PiKVCache.for_model(model, **limits, **OPTIONS[kind], tier_directory=str(folder))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_tree_of_processes_goes_on(
    kind: str, model: Any, ids: torch.Tensor, alone: dict[str, Any], limits: dict[str, Any], tmp_path: Path
) -> None:
    cache, fork = cache_on_disk(model, limits, tmp_path, kind), Fork({3, 11})
    tokens = tokens_of_all(fork, lambda **options: generate(model, ids, cache, **options))
    assert tokens == [alone[kind]] * 4
    assert not list(tmp_path.iterdir())


@settings(max_examples=6)
@given(st.sets(st.integers(0, STEPS - 1), min_size=1, max_size=2), st.sampled_from(sorted(OPTIONS)))
def test_at_any_step(model: Any, ids: torch.Tensor, alone: Any, limits: Any, steps: Any, kind: str) -> None:
    cache, fork = PiKVCache.for_model(model, **limits, **OPTIONS[kind]), Fork(steps)
    tokens = tokens_of_all(fork, lambda **options: generate(model, ids, cache, **options))
    assert tokens == [alone[kind]] * 2 ** len(steps)


def test_with_reads_in_flight(
    model: Any,
    ids: torch.Tensor,
    expected: torch.Tensor,
    limits: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that reads ahead is in the middle of it, and not there in the child."""
    monkeypatch.setattr(tiered_pool, "STAGE_BYTES", 9000)
    read = Records.read

    def slow(self: Records, out: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
        read(self, out)

    monkeypatch.setattr(Records, "read", slow)
    cache, in_flight = cache_on_disk(model, limits, tmp_path), []

    def look() -> None:
        for pool in pools_of(cache):
            pool.prefetch(pool.lower.pages("disk"))
        in_flight.append(any(not reading._done.done() for reading in cache.tiers.prefetch_thread._readings))

    fork = Fork({4, 9}, look)
    tokens = tokens_of_all(fork, lambda **options: generate(model, ids, cache, **options))
    assert tokens == [expected.tolist()] * 4
    assert all(in_flight)


def test_what_is_new_goes_to_a_file_of_the_process(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, limits: dict[str, Any], tmp_path: Path
) -> None:
    """Both write after the fork; neither sees, cuts off or rewrites what the other wrote."""
    cache = cache_on_disk(model, limits, tmp_path)
    got = generate(model, ids, cache, max_new_tokens=2)
    sizes = {file.path: file.nbytes for file in files_of(cache)}

    def in_child() -> list[Any]:
        inherited = files_of(cache)
        # More pages than before: a longer generation than the parent's.
        generate(model, got, cache, max_new_tokens=60)
        made = [file for file in files_of(cache) if file not in inherited]
        return [len(made), {str(file.path): file.nbytes for file in inherited}]

    made, seen = in_a_child(in_child)
    assert made
    assert seen == {str(path): size for path, size in sizes.items()}
    assert torch.equal(generate(model, got, cache, max_new_tokens=STEPS - 2), expected)


def in_a_child(work: Callable[[], Any]) -> Any:
    """Return what a process forked by `multiprocessing` returns."""
    context = multiprocessing.get_context("fork")
    reads, writes = context.Pipe(duplex=False)
    child = context.Process(target=lambda: writes.send(work()))
    child.start()
    assert reads.poll(60), "the forked process hangs"
    result = reads.recv()
    child.join(30)
    assert child.exitcode == 0
    return result


def test_workers_of_multiprocessing(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, limits: dict[str, Any], tmp_path: Path
) -> None:
    """One context, and a worker for each question: all fork from the same process."""
    cache = cache_on_disk(model, limits, tmp_path)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.crop(LENGTH - 1)
    for fork in itertools.chain([cache] * 2, [cache.fork()]):
        assert in_a_child(lambda fork=fork: generate(model, ids, fork).tolist()) == expected.tolist()
    assert torch.equal(generate(model, ids, cache), expected)


def test_limits_are_of_each_process(model: Any, ids: torch.Tensor, limits: dict[str, Any], tmp_path: Path) -> None:
    cache = cache_on_disk(model, limits, tmp_path)
    generate(model, ids, cache)
    before = cache.tiers.bytes_used()

    def in_child() -> Any:
        same = cache.tiers.bytes_used() == before
        cache.crop(8)
        for layer in cache.layers:
            layer.parts[0].tiers.make_disk_room(0)
        return same, sum(cache.tiers.pages().values())

    assert in_a_child(in_child) == (True, 0)
    assert cache.tiers.bytes_used() == before
