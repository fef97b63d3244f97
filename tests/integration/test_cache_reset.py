"""reset(): the cache is like a new one, whatever it held, waited for or counted; and other calls without tokens."""

from typing import Any

import pytest
import torch
from exact_runs import assert_same
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
}
ROUTED = {"routing": "page_bound", "max_pages": 3}
EVICTING = {"budget": 40, "scheduler": "h2o", "placement": "hash"}


def run(model: Any, cache: Any, batch: int = 2) -> Any:
    return model.generate(**prompts(batch, 60), past_key_values=cache, **GREEDY)


def as_new(cache: PiKVCache) -> None:
    assert cache.get_seq_length() == 0
    assert [cache.get_seq_length(index) for index in range(len(cache))] == [0] * len(cache)
    assert not cache.is_initialized
    assert all(keys is None and values is None for keys, values, _ in cache)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"placement": "balanced", "tiers": {"cpu": "256KiB", "disk": None}, **ROUTED}),
        ("qwen3_moe", EVICTING),
        ("qwen3_moe", {"devices": ["cpu:0", "cpu:1"]}),
        ("mixtral_sliding", {}),
        ("mixtral_sliding", {"sliding_layers": "paged"}),
        ("gpt_oss", {}),
        pytest.param("llama4", {}, marks=pytest.mark.slow),
    ],
)
def test_the_same_again_and_other_batches(family: str, options: dict[str, Any]) -> None:
    model = FAMILIES[family].build()
    cache = PiKVCache.for_model(model, **SMALL, **options)
    first, counted = run(model, cache), cache.stats().to_dict()
    cache.reset()
    as_new(cache)
    assert_same(run(model, cache), first)
    assert without_times(cache.stats().to_dict()) == without_times(counted)
    cache.reset()
    cache.reset()
    assert_same(run(model, cache, batch=1), run(model, PiKVCache.for_model(model, **SMALL, **options), batch=1))


def without_times(counted: Any) -> Any:
    if isinstance(counted, dict):
        return {key: without_times(value) for key, value in counted.items() if "seconds" not in key and key != "tiers"}
    return [without_times(each) for each in counted] if isinstance(counted, list) else counted


def test_another_dtype_afterwards() -> None:
    model = FAMILIES["mixtral_sliding"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    run(model, cache)
    cache.reset()
    model.to(torch.bfloat16)
    assert torch.equal(run(model, cache).sequences, run(model, PiKVCache.for_model(model, **SMALL)).sequences)


def test_while_tokens_wait_and_where_forks_have_them() -> None:
    model = FAMILIES["qwen3_moe"].build()
    attach(model)
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(**prompts(2, 40), past_key_values=cache)
    fork = cache.fork()
    keys = torch.zeros(2, 2, 4, 16)
    cache.layers[0].update_from_attention(keys, keys)
    assert cache.layers[0].pending is not None
    cache.reset()
    as_new(cache)
    assert fork.get_seq_length() == 40
    expected = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(**prompts(2, 40), past_key_values=expected)
        more = torch.full((2, 1), 5)
        mask = torch.nn.functional.pad(prompts(2, 40)["attention_mask"], (0, 1), value=1)
        given = {"input_ids": more, "attention_mask": mask}
        assert torch.equal(model(**given, past_key_values=fork).logits, model(**given, past_key_values=expected).logits)
    assert_same(run(model, cache), run(model, PiKVCache.for_model(model, **SMALL)))


def test_memory_comes_back() -> None:
    model = FAMILIES["mixtral_sliding"].build()
    for options in ({}, {"sliding_layers": "paged"}):
        cache = PiKVCache.for_model(model, **SMALL, **options)
        run(model, cache)
        assert cache.nbytes
        cache.reset()
        assert cache.nbytes == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral_sliding"])
def test_operations_on_a_cache_without_tokens(family: str) -> None:
    """New or reset: nothing happens, as with DynamicCache, and the cache goes on."""
    model = FAMILIES[family].build()
    used = PiKVCache.for_model(model, **SMALL)
    expected = run(model, used)
    used.reset()
    for cache in (used, PiKVCache.for_model(model, **SMALL)):
        # Where DynamicCache has sliding layers it fails here.
        cache.crop(0)
        cache.crop(-3)
        for each in (cache, DynamicCache(config=model.config)):
            each.batch_repeat_interleave(2)
            each.batch_select_indices(torch.tensor([0]))
            each.reorder_cache(torch.tensor([1, 0]))
            each.reset()
            assert each.get_seq_length() == 0
        as_new(cache)
        assert_same(run(model, cache), expected)


@pytest.mark.parametrize("length", [0, 5, 17, -3, -20])
def test_crops_within_the_window(length: int) -> None:
    """While a sliding layer has all of its tokens, a crop is what DynamicCache makes of it."""
    model = FAMILIES["mixtral_sliding"].build()
    reference = DynamicCache(config=model.config)
    cache = PiKVCache.for_model(model, **SMALL)
    ids = prompts(1, 20)["input_ids"]
    with torch.no_grad():
        for each in (reference, cache):
            model(ids, past_key_values=each)
            each.crop(length - 20 if length > 0 else length)
        assert cache.get_seq_length() == reference.get_seq_length()
        ours, theirs = (model(ids[:, :9], past_key_values=each).logits for each in (cache, reference))
    assert (ours - theirs).abs().max() <= 1e-4
