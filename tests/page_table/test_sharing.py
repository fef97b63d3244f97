"""Beams, repeats and forks share pages; memory is what the report says."""

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.layer.layer_reads import storages
from pikv_hf.reports.memory_report import format_bytes

PREFIX = 4096


def prefix(rows: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 190, (1, PREFIX), generator=torch.Generator().manual_seed(0)).expand(rows, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


@pytest.fixture(scope="module")
def one_sequence(model: Any) -> int:
    """Bytes of the 4,096-token prefix held once."""
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(**prefix(), past_key_values=cache)
    return cache.nbytes


def dynamic_bytes(cache: DynamicCache) -> int:
    return live_bytes(t for layer in cache.layers for t in (layer.keys, layer.values))


def test_repeated_rows_share_their_prefix(model: Any, one_sequence: int) -> None:
    cache, dynamic = PiKVCache.for_model(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prefix(), past_key_values=cache)
        model(**prefix(), past_key_values=dynamic)
        single = dynamic_bytes(dynamic)
        for each in (cache, dynamic):
            each.batch_repeat_interleave(8)
            for step in range(24):
                model(input_ids=torch.arange(8)[:, None] + 2 + step, past_key_values=each)
    assert dynamic_bytes(dynamic) > 8 * single
    assert cache.nbytes < 1.2 * one_sequence
    assert cache.nbytes < 1.2 * single


def test_beams_of_one_generate_call_share_their_prompt(model: Any, one_sequence: int) -> None:
    """`generate(num_beams=8)` repeats its inputs before the prompt is run."""
    cache, dynamic = PiKVCache.for_model(model), DynamicCache(config=model.config)
    options = {"max_new_tokens": 40, "num_beams": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**prefix(), past_key_values=cache, **options)
    theirs = model.generate(**prefix(), past_key_values=dynamic, **options)
    assert torch.equal(ours, theirs)
    assert dynamic_bytes(dynamic) > 7.5 * one_sequence * 0.9
    assert cache.nbytes < 1.2 * one_sequence


def test_forks_share_until_they_write(model: Any) -> None:
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(**prefix(), past_key_values=cache)
    before = cache.nbytes
    forks = [cache.fork() for _ in range(10)]
    assert live_bytes(t for fork in forks for layer in fork.layers for t in storages(layer.store)) <= before
    with torch.no_grad():
        for fork in forks:
            model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=fork)
    assert forks[0].nbytes < 1.15 * before
    pool = cache.layers[0].table.plain
    free = pool.allocator.free_pages
    del forks, fork
    gc.collect()
    cache.memory_report()
    assert pool.allocator.free_pages >= free + 10, "dropped forks kept their pages"


def test_padding_is_never_stored(model: Any) -> None:
    ids = torch.randint(2, 190, (2, 200))
    mask = torch.ones_like(ids)
    mask[0, :150] = 0
    cache = PiKVCache.for_model(model)
    model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert [layer.table.tokens() for layer in cache.layers] == [[59, 209]] * 2
    assert cache.get_seq_length() == 209


def test_freed_pages_are_reused(model: Any) -> None:
    cache = PiKVCache.for_model(model, page_size=8)
    with torch.no_grad():
        model(input_ids=torch.randint(2, 190, (1, 512)), past_key_values=cache)
        capacity = cache.layers[0].table.plain.capacity
        for _ in range(5):
            cache.crop(256)
            model(input_ids=torch.randint(2, 190, (1, 256)), past_key_values=cache)
        assert cache.layers[0].table.plain.capacity <= capacity * 1.2


def test_decoding_does_not_copy_the_history(model: Any) -> None:
    """The pool grows geometrically: 1,000 decoded tokens move it a few times, not once a token."""
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(**prefix(), past_key_values=cache)
        pointers = set()
        for _ in range(300):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
            pointers.add(cache.layers[0].table.plain.keys.data_ptr())
    assert len(pointers) <= 4


def test_memory_report_adds_up(model: Any) -> None:
    cache = PiKVCache.for_model(model, num_shards=4)
    assert cache.nbytes == 0
    model.generate(**prefix(), past_key_values=cache, max_new_tokens=50, do_sample=False)
    report = cache.memory_report()
    tensors = [t for layer in cache.layers for t in storages(layer.store)]
    host = sum(layer.table.plain.host_bytes + layer.table.host_bytes for layer in cache.layers)
    assert report.total == cache.nbytes == live_bytes(tensors) + host
    assert report.total == report.keys + report.values + report.metadata
    assert report.total == sum(report.per_layer.values()) == sum(report.per_device.values())
    for layer in report.layers:
        assert layer.keys + layer.values == layer.window + sum(layer.shards) + layer.free
        assert len(layer.shards) == 4
        assert layer.tokens_stored == layer.tokens_seen == PREFIX + 49
    assert sum(report.per_shard) == sum(sum(layer.shards) for layer in report.layers)
    dynamic = (PREFIX + 49) * 2 * 2 * 2 * 16 * 4
    assert dynamic < report.total < 1.15 * dynamic
    text = str(report)
    assert format_bytes(report.total) in text
    assert "shards" in text
    assert max(map(len, text.splitlines())) <= 110
    assert report.to_dict()["total"] == report.total


def test_sliding_layers_are_counted() -> None:
    model = FAMILIES["gpt_oss"].build()
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(input_ids=torch.randint(2, 190, (1, 300)), past_key_values=cache)
    kinds = [layer.kind for layer in cache.memory_report().layers]
    assert kinds == ["sliding", "paged", "sliding"]
    assert all(layer.total > 0 for layer in cache.memory_report().layers)
