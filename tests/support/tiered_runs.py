"""Caches with room for half of their pages in fast memory, and generation with them."""

from pathlib import Path
from typing import Any

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.tiers.page_file import PageFile

LAYOUT = {"page_size": 8, "recent_window": 16, "num_shards": 2}
LENGTH, STEPS = 200, 24


def generate(model: Any, ids: Any, cache: Any, **options: Any) -> torch.Tensor:
    inputs = ids if isinstance(ids, dict) else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


def pools_of(cache: PiKVCache) -> list[Any]:
    layers = [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]
    return [pool for layer in layers for pool in layer.table.pools.packed.values()]


def opened(file: PageFile) -> Path:
    """Return a path by which an open file, which has no name, can be read, damaged and cut off."""
    return Path(f"/proc/self/fd/{file.descriptor}")


def files_of(cache: PiKVCache) -> list[PageFile]:
    return [file for pool in pools_of(cache) for file in pool.lower._files.values()]


def half(model: Any, ids: Any, codec: str = "none", **options: Any) -> dict[str, Any]:
    """Return options of a cache with room for half of its pages in fast memory, the others on disk."""
    options = {**LAYOUT, "key_codec": codec, "value_codec": codec, **options}
    cache = PiKVCache.for_model(model, tiers={"cpu": None, "disk": None}, **options)
    with torch.no_grad():
        model(**(ids if isinstance(ids, dict) else {"input_ids": ids}), past_key_values=cache)
    # Lazily written: the call after the prompt would place its last tokens.
    cache.memory_report()
    return {**options, "tiers": {"cpu": sum(cache.tiers.bytes_used().values()) // 2, "disk": None}}


def fast_bytes(cache: PiKVCache) -> int:
    return live_bytes(tensor for pool in pools_of(cache) for tensor in pool.token_tensors())
