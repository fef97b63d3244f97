"""What is cropped, left out, evicted or dropped gives its memory back, and costs no step more than it saves."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_machine import CODECS
from memory_programs import MOST, Program, few_pages, programs, run

from pikv_hf import PiKVCache
from pikv_hf.pages.page_pool import PagePool
from pikv_hf.pages.plain_pool import PlainPool
from pikv_hf.pages.pool_growth import MAX_FREE

SMALL = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=1)


@settings(max_examples=10)
@given(program=programs())
def test_a_cache_holds_little_more_than_a_fresh_one(model: Any, program: Program) -> None:
    assert not run(model, program).too_much()


@pytest.mark.slow
@settings(max_examples=100)
@given(program=programs())
def test_a_cache_holds_little_more_than_a_fresh_one_whatever_was_done(model: Any, program: Program) -> None:
    assert not run(model, program).too_much()


# Against a cache to which less was done

TOKENS, LEFT, ROWS = 1200, 60, 8


def ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 190, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))[:, :tokens]


Read = Callable[[torch.Tensor, PiKVCache], Any]


def cropped(read: Read, cache: PiKVCache, full: bool) -> None:
    read(ids(TOKENS if full else LEFT), cache)
    cache.crop(LEFT)


def without_rows(read: Read, cache: PiKVCache, full: bool) -> None:
    """Rows end one after the other."""
    read(ids(200, ROWS if full else 1), cache)
    for rows in range(ROWS - 1, 0, -1) if full else ():
        cache.batch_select_indices(torch.arange(rows))


def begun_anew(read: Read, cache: PiKVCache, full: bool) -> None:
    if full:
        read(ids(TOKENS), cache)
        cache.reset()
    read(ids(LEFT), cache)


def with_forks_dropped(read: Read, cache: PiKVCache, full: bool) -> None:
    read(ids(LEFT), cache)
    for seed in range(3) if full else ():
        read(ids(300, seed=seed), cache.fork())


@pytest.mark.parametrize(
    "codecs",
    [
        codecs if number % 6 == 1 else pytest.param(codecs, marks=pytest.mark.slow)
        for number, codecs in enumerate(CODECS)
    ],
    ids="-".join,
)
@pytest.mark.parametrize("history", [cropped, without_rows, begun_anew, with_forks_dropped])
@torch.no_grad()
def test_history_that_is_gone_takes_no_memory(model: Any, codecs: tuple[str, str], history: Any) -> None:
    def made(full: bool) -> PiKVCache:
        cache = PiKVCache.for_model(model, **SMALL, key_codec=codecs[0], value_codec=codecs[1], rank=4)
        history(lambda new, which: model(new, past_key_values=which), cache, full)
        for step in range(12):
            model(ids(1, seed=step), past_key_values=cache)
        return cache

    used, fresh = made(full=True), made(full=False)
    assert used.nbytes <= MOST * fresh.nbytes + few_pages(used)


# What it costs


@pytest.mark.parametrize("rows", [1, 6])
@torch.no_grad()
def test_drafts_that_are_refused_move_no_pages(model: Any, rows: int) -> None:
    cache = PiKVCache.for_model(model, **SMALL)
    model(ids(70, rows), past_key_values=cache)
    made_smaller, compact = [], PagePool._compact

    def compacted(pool: PagePool, spare: int) -> Any:
        made_smaller.append(number := compact(pool, spare))
        return number

    with mock.patch.object(PagePool, "_compact", compacted):
        for step in range(60):
            model(ids(4, rows, seed=step), past_key_values=cache)
            cache.crop(-3)
    assert cache.get_seq_length() == 130
    assert len(made_smaller) >= 60
    # The first draft reserves for the worst case, which is not to be kept.
    assert all(number is None for number in made_smaller[4:])


@given(sizes=st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), max_size=60), rows=st.integers(1, 5))
def test_copies_are_paid_for_by_what_was_freed(sizes: list[tuple[int, float]], rows: int) -> None:
    pool = PlainPool(1, 2, 2, 4, torch.float32, torch.device("cpu"))
    held, freed, copied = np.zeros(0, dtype=np.int64), 0, 0
    for new, share in sizes:
        held = np.append(held, pool.allocate(new))
        pool.keys[0, held] = torch.from_numpy(held)[:, None, None].float() if not copied else pool.keys[0, held]
        stays = int(len(held) * share)
        pool.decref(held[stays:])
        freed, held = freed + len(held) - stays, held[:stays]
        if (number := pool.give_back(rows)) is not None:
            copied += len(held)
            held = number[held]
        assert sorted(held) == np.flatnonzero(pool.allocator.refcount).tolist()
        assert pool.capacity <= len(held) + max(len(held) * MAX_FREE, 2 * rows + max(4, len(held) * pool.growth))
        assert copied <= 8 * freed


@given(kept=st.lists(st.booleans(), min_size=1, max_size=40))
def test_pages_in_use_keep_their_tokens_and_their_order(kept: list[bool]) -> None:
    pool = PlainPool(2, 3, 5, 4, torch.float32, torch.device("cpu"))
    pool.keep_bounds()
    pool.keep_usage(0)
    ids = pool.allocate(len(kept))
    pool.keys.normal_(generator=torch.Generator().manual_seed(0))
    pool.values.copy_(pool.keys[..., :1].expand_as(pool.values))
    pool.positions[:] = torch.arange(len(kept))[:, None]
    pool.count[ids] = np.arange(len(kept)) % 5
    pool.usage.add(torch.arange(len(kept)), torch.arange(len(kept)).float())
    pool.key_bounds(ids)
    stays = ids[kept]
    before = [pool.keys[:, stays], pool.values[:, stays], pool.positions[stays], pool.count[stays]]
    before += [pool.usage.shares[:, stays], pool.bounds.low[:, stays]]
    before = [torch.as_tensor(each).clone() for each in before]
    pool.decref(ids[~np.array(kept)])
    number = pool.compact()
    now = np.arange(pool.capacity) if number is None else number[stays]
    assert now.tolist() == list(range(len(stays)))
    assert pool.capacity == len(stays)
    after = [pool.keys, pool.values, pool.positions, pool.count, pool.usage.shares, pool.bounds.low]
    assert all(torch.equal(torch.as_tensor(new), old) for new, old in zip(after, before, strict=True))
