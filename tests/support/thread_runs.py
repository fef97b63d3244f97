"""The same work in many threads at once, and what the model says where each cache is used by one thread alone."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from families import VOCAB

from pikv_hf import PiKVCache

THREADS = 8
NEW_TOKENS = 6
SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8, "sink_tokens": 2, "num_shards": 3}
#: Options of a cache by name; with tiers pages move between memory and files all the time.
CACHES: dict[str, dict[str, Any]] = {
    "expert": {},
    "hash": {"placement": "hash"},
    "tiers": {"tiers": {"cpu": "24KiB", "disk": None}},
    "int8": {"key_codec": "int8", "value_codec": "int8"},
    "int8_tiers": {"key_codec": "int8", "value_codec": "int8", "tiers": {"cpu": "12KiB", "disk": None}},
}


@contextmanager
def often_switched() -> Iterator[None]:
    """Let Python change threads a hundred times as often as it does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """Return what `work` returns for each of the threads, which run at once; the first error of any is raised."""
    with often_switched(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def tokens(length: int, seed: int) -> torch.Tensor:
    """Return `(1, length)` random tokens."""
    return torch.randint(2, VOCAB - 1, (1, length), generator=torch.Generator().manual_seed(seed))


def answer(model: Any, ids: torch.Tensor, cache: Any) -> list[int]:
    """Return what the model says after a prompt, greedily."""
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


def own_caches(model: Any, rounds: int, **options: Any) -> None:
    """Have each thread answer with a cache of its own, again and again; each answer is right."""
    prompts = [tokens(18 + 3 * number, number) for number in range(THREADS)]
    expected = [answer(model, ids, PiKVCache.for_model(model, **SMALL, **options)) for ids in prompts]

    def work(number: int) -> None:
        for turn in range(rounds):
            said = answer(model, prompts[number], PiKVCache.for_model(model, **SMALL, **options))
            assert said == expected[number], f"thread {number}, round {turn}"

    in_threads(work)


def forks_of_one(model: Any, rounds: int, **options: Any) -> None:
    """Have each thread answer a question about one context with its fork, again and again; each answer is right."""
    context = tokens(40, 99)
    questions = [torch.cat([context, tokens(3 + number, number)], dim=1) for number in range(THREADS)]
    cache = PiKVCache.for_model(model, **SMALL, **options)
    with torch.no_grad():
        model(context, past_key_values=cache)
    expected = [answer(model, ids, cache.fork()) for ids in questions]
    held = [cache.nbytes, cache.layers[0].dense()]

    def work(number: int) -> None:
        for turn in range(rounds):
            # Dropped in the next round, while other threads write.
            fork = cache.fork()
            assert answer(model, questions[number], fork) == expected[number], f"thread {number}, round {turn}"

    in_threads(work)
    assert all(map(torch.equal, cache.layers[0].dense(), held[1])), "forks have changed the context"
    for layer in cache.layers:
        layer.store.release_abandoned()
        for pool in layer.table.pools.by_id().values():
            assert pool.allocator.refcount.max() <= 1, "forks that are gone hold pages"
