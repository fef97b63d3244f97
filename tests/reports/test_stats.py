"""What a cache counts, against counts made by hand."""

from typing import Any

import pytest
import torch
from families import FAMILIES, prompts

from pikv_hf import PiKVCache

OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("batch", [1, 2])
def test_pages_read_and_held(batch: int) -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **OPTIONS, routing="page_bound", max_pages=3)
    inputs = prompts(batch, 150)
    held = read = steps = 0
    with torch.no_grad():
        ids, mask = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1), inputs["attention_mask"]
        for _ in range(9):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ids = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
            for layer in cache.layers:
                for row in layer.table.rows:
                    full, always = len(row.full), len(row.unfilled())
                    held += (full + always) * layer.store.heads
                    read += (min(full, 3) + always) * layer.store.heads
                steps += 1
    stats = cache.stats()
    assert (stats.routed_steps, stats.pages_held, stats.pages_read) == (steps, held, read)
    assert stats.read_share == read / held
    assert f"{read:,} of {held:,}" in str(stats)


def test_what_was_evicted() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **OPTIONS, budget=80, scheduler="streaming_llm")
    model.generate(**prompts(1, 150), past_key_values=cache, **GREEDY)
    stats = cache.stats()
    stored = sum(tokens for layer in cache.layers for tokens in layer.table.tokens())
    seen = sum(layer.get_seq_length() for layer in cache.layers)
    assert stats.tokens_evicted == seen - stored > 0
    assert stats.tokens_evicted <= 8 * stats.pages_evicted


def test_tables_of_tiers() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **OPTIONS, tiers={"cpu": "48KiB", "disk": "1MiB"})
    model.generate(**prompts(1, 150), past_key_values=cache, **GREEDY)
    stats = cache.stats()
    assert stats.tiers is not None
    assert stats.to_dict()["tiers"]["bytes"]["cpu"] <= 48 * 1024
    assert stats.tiers["hits"] > 0 < stats.tiers["misses"]
    assert stats.tiers["bytes_moved"]["disk->cpu"] > 0
    text = str(stats)
    for expected in ("cpu", "disk", "48.0 KiB", "1.0 MiB", f"{stats.tiers['hit_rate']:.1%}"):
        assert expected in text
