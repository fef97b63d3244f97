"""Lists of pages for compiled kernels: what they keep in memory, and when they are made anew."""

import gc
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pikv_hf import PiKVCache


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).eval()


@torch.no_grad()
def test_a_fork_that_waits_keeps_no_tensors_of_a_pool_that_has_grown(model: LlamaForCausalLM) -> None:
    cache = PiKVCache.for_model(model, placement="hash", page_size=4, recent_window=8)
    tokens = torch.randint(0, 64, (1, 100))
    model(tokens, past_key_values=cache)
    fork = cache.fork()
    model(tokens[:, :1], past_key_values=fork)
    model(tokens[:, :1], past_key_values=cache)
    pool = cache.layers[0].table.plain
    old, pages = weakref.ref(pool.keys), pool.capacity
    for _ in range(100):
        model(tokens[:, :1], past_key_values=cache)
    gc.collect()
    assert pool.capacity > pages
    assert old() is None
    # What it had learnt of the pool is made anew.
    ours = model(tokens[:, :1], past_key_values=fork).logits
    again = PiKVCache.for_model(model, placement="hash", page_size=4, recent_window=8)
    model(torch.cat([tokens, tokens[:, :1]], dim=1), past_key_values=again)
    torch.testing.assert_close(ours, model(tokens[:, :1], past_key_values=again).logits)
