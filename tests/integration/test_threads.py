"""Threads on one model, each with a cache of its own or with its fork of one."""

import gc
import os
import threading
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES
from placed_hooks import hooks_of
from thread_runs import CACHES, SMALL, answer, forks_of_one, in_threads, own_caches, tokens
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.integration.attachment import attachment_of


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("work", [own_caches, forks_of_one])
def test_threads_get_right_answers(model: Any, work: Any, name: str) -> None:
    work(model, 2, **CACHES[name])


@pytest.mark.slow
@pytest.mark.parametrize("work", [own_caches, forks_of_one])
def test_threads_of_other_families(work: Any) -> None:
    """A dense layer below routed ones, multi-head latent attention; sliding layers and sinks."""
    work(FAMILIES["deepseek_v3"].build(), 2)
    work(FAMILIES["gpt_oss"].build(), 2, sliding_layers="paged")


def test_expected_answers_are_those_of_dynamic_cache(model: Any) -> None:
    ids = tokens(30, 7)
    expected = answer(model, ids, DynamicCache(config=model.config))
    assert answer(model, ids, PiKVCache.for_model(model, **SMALL)) == expected


def test_threads_with_other_caches(model: Any) -> None:
    """What a router says in a thread without a `PiKVCache` reaches none."""
    ids = tokens(30, 7)
    expected = answer(model, ids, DynamicCache(config=model.config))

    def work(number: int) -> list[int]:
        kinds = [lambda: PiKVCache.for_model(model, **SMALL), lambda: DynamicCache(config=model.config), lambda: None]
        return answer(model, ids, kinds[number % 3]())

    assert in_threads(work) == [expected] * 8


def test_model_is_attached_once(model: Any) -> None:
    """Threads that attach a model at the same time get one attachment."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    found = in_threads(lambda _: PiKVCache.for_model(model).attachment)
    assert set(map(id, found)) == {id(attachment_of(model))}
    assert attachment_of(model).caches_made == 8
    detach(model)
    assert hooks_of(model) == 0

    def in_block(_: int) -> None:
        with attach(model):
            assert attachment_of(model).active

    in_threads(in_block)
    assert not attachment_of(model).active


def test_forks_dropped_within_an_operation_give_back_their_pages(model: Any) -> None:
    """Also where that operation fails, and undoes what it has done to the pages."""
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(tokens(40, 1), past_key_values=cache)
    table = cache.layers[0].table
    fork = [cache.fork()]

    def drop_and_fail() -> None:
        with table.transaction():
            fork.clear()
            gc.collect()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drop_and_fail()
    assert table.plain.allocator.refcount.max() == 2
    cache.memory_report()
    assert table.plain.allocator.refcount.max() == 1


def test_reports_while_others_write(model: Any) -> None:
    cache = PiKVCache.for_model(model, **SMALL, **CACHES["int8_tiers"])
    with torch.no_grad():
        model(tokens(40, 1), past_key_values=cache)

    def work(number: int) -> None:
        for _ in range(3):
            fork = cache.fork()
            if number % 2:
                answer(model, torch.cat([tokens(40, 1), tokens(5, number)], dim=1), fork)
            else:
                assert fork.nbytes > 0
                str(fork.stats())

    in_threads(work)


def test_locks_are_of_a_cache_and_its_forks(model: Any) -> None:
    caches = [PiKVCache.for_model(model) for _ in range(2)]
    fork = caches[0].fork()
    assert {id(layer.lock) for cache in (caches[0], fork) for layer in cache.layers} == {id(caches[0].lock)}
    assert caches[1].lock is not caches[0].lock
    forgotten = weakref.ref(caches.pop().lock)
    gc.collect()
    assert forgotten() is None, "a cache's lock has outlived it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork() on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_gets_caches_that_nobody_works_on(model: Any) -> None:
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(tokens(40, 1), past_key_values=cache)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            cache.fork().nbytes  # noqa: B018

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                # The other thread, which would release the lock, is not there.
                os._exit(0 if cache.lock.acquire(timeout=20) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
