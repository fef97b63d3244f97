"""Small caches with a budget, what they hold, and a check that they keep to it."""

import functools
from typing import Any

import torch
from budgeted_layer import shard_holdings
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 3}
#: Sinks, window and two pages of SMALL.
LEAST = 8 + 16 + 16


@functools.cache
def shared_model(family: str = "qwen3_moe") -> Any:
    """Return a model of two layers that tests leave as it is."""
    sliding = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    return FAMILIES[family].build(num_hidden_layers=2, **sliding)


def make_cache(model: Any, **options: Any) -> PiKVCache:
    return PiKVCache.for_model(model, **{**SMALL, **options})


def paged_layers(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


def held(layer: PiKVLayer) -> float:
    """Return the most tokens that a sequence holds, mean over KV heads."""
    return float(layer.stored_mask().sum(2).float().mean(1).max())


@torch.no_grad()
def decode(model: Any, cache: PiKVCache, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Read tokens one by one; returns the logits `(B, n, V)`."""
    return torch.cat([model(part, past_key_values=cache, **more).logits for part in ids.split(1, dim=1)], dim=1)


def check(cache: PiKVCache, forks: int = 1) -> None:
    """Every limit of the cache holds, on what is measured."""
    options, layers = cache.pikv_config, paged_layers(cache)
    budget, scope = options.budget, options.budget_scope
    if isinstance(budget, str):
        amount = int(float(budget.removesuffix("KB")) * 1000)
        if scope == "shard":
            for layer in layers:
                table = layer.table
                page = table.plain.full_page_bytes * len(table.rows)
                assert shard_holdings(layer).max() <= amount // page * table.plain.page_size
        elif scope == "layer":
            report = cache.memory_report()
            assert all(r.total <= amount * forks for r in report.layers if r.kind == "paged")
        else:
            assert cache.nbytes <= amount * forks
        return
    cache.memory_report()
    if layers[0].decides_jointly:
        for group in [[layer] for layer in layers] if scope == "layer" else [layers]:
            check_shared(group, budget / len(layers) if scope == "cache" and isinstance(budget, int) else budget)
        return
    for layer in layers:
        most = budget if isinstance(budget, int) else int(budget * layer.seen)
        if scope == "shard":
            most = most if isinstance(budget, int) else most // layer.table.num_shards
            assert shard_holdings(layer).max() <= most
        elif scope == "cache" and isinstance(budget, int):
            assert held(layer) <= budget / len(layers)
        else:
            assert held(layer) <= (most if isinstance(budget, int) else max(most, LEAST))


def gave_way(layer: PiKVLayer) -> bool:
    """Return whether a layer has evicted or packed anything for its budget."""
    return layer.parts[0].scheduler.tokens_evicted > 0 or bool(layer.table.pools.packed)


def held_bytes(layer: PiKVLayer, row: int) -> float:
    """Return the bytes of the tokens of a sequence, each with its part of the page that it is in."""
    total = 0.0
    for name, pool in layer.table.pools.by_id().items():
        for lane in range(layer.store.lanes):
            for page in layer.table.rows[row * layer.store.lanes + lane].pages(name):
                tokens = int((pool.positions[page] >= 0).sum())
                total += pool.page_bytes * tokens / pool.page_size
    return total


def check_shared(layers: list[PiKVLayer], budget: float) -> None:
    """A budget in tokens that layers share holds: each counts with the bytes that it takes, as it came with all."""
    for row in range(layers[0].batch):
        held, most = 0.0, 0.0
        for layer in layers:
            seen = layer.seen - layer.store.padding()[row]
            plain = layer.table.plain
            as_it_came = plain.page_bytes / plain.page_size * layer.store.lanes
            most += as_it_came * (max(int(budget * seen), LEAST) if budget < 1 else budget)
            held += held_bytes(layer, row)
        assert held <= most


@torch.no_grad()
def run(model: Any, cache: PiKVCache, ids: torch.Tensor, prompt: int, chunk: int, **more: Any) -> None:
    """Read a prompt in chunks, then the rest one by one; the budget is looked at after each."""
    for part in (*ids[:, :prompt].split(chunk, dim=1), *ids[:, prompt:].split(1, dim=1)):
        model(part, past_key_values=cache, logits_to_keep=1, **more)
        check(cache)
