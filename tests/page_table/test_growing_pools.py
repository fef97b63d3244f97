"""Pools grow, and get other tensors, while rows are in the middle of a page."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pikv_hf import PiKVCache
from pikv_hf.config import PiKVConfig
from pikv_hf.pages.plain_pool import PlainPool
from pikv_hf.pages.row_slots import RowSlots

HEADS, DIM = 2, 16


def empty_cache() -> PiKVCache:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=32)
    return PiKVCache(config, pikv_config=PiKVConfig(page_size=16, recent_window=32, sink_tokens=4))


def put(cache: Any, seen: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """Store new tokens; return all keys as the cache has them."""
    new = torch.randn(1, HEADS, tokens, DIM)
    seen.append(new)
    keys: torch.Tensor = cache.update(new, -new, 0)[0]
    return keys


@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 1, 1, 7, 300])), min_size=4, max_size=40),
    context=st.integers(1, 40),
)
def test_forks_of_one_pool_take_turns(turns: list[tuple[int, int]], context: int) -> None:
    """Each keeps its own tokens, however often another makes the pool grow within a page."""
    cache, first = empty_cache(), []
    put(cache, first, context)
    forks = [(cache.fork(), [*first]) for _ in range(4)]
    for number, tokens in [*turns, *((number, 1) for number in range(4))]:
        fork, seen = forks[number]
        assert torch.equal(put(fork, seen, tokens), torch.cat(seen, dim=2))


def test_slots_are_those_of_the_tensors_that_a_pool_has() -> None:
    """Twice over: what follows a pool is dropped as its tensors are, and has to follow it again."""
    pool = PlainPool(HEADS, DIM, DIM, 8, torch.float32, torch.device("cpu"))
    slots = RowSlots(pool, 8 * pool.allocate(2))
    for offset in range(4):
        keys, values = torch.randn(2, HEADS, 1, DIM), torch.randn(2, HEADS, 1, DIM)
        slots.write(offset, keys, values, 30 + offset)
        slots.write_experts(offset, torch.tensor([offset, offset + 1]))
        for stored, new in ((pool.keys, keys), (pool.values, values)):
            assert torch.equal(stored[:, :2, offset].transpose(0, 1), new.squeeze(2))
        assert pool.positions[:2, offset].tolist() == [30 + offset] * 2
        assert pool.experts[:2, offset].tolist() == [offset, offset + 1]
        before = pool.keys
        pool.allocate(2 * pool.capacity)
        assert pool.keys is not before
    slots.empty(3)
    assert pool.positions[:2].tolist() == [[30, 31, 32, -1, -1, -1, -1, -1]] * 2
