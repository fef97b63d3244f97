"""The bytes that processes store and send."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from families import FAMILIES
from press_runs import ids_of, read
from process_scenarios import Scenario, Spread, cache_for, model_of


def small_model() -> Any:
    """Return a model of two layers whose K/V are large beside what is kept about them."""
    return model_of(num_hidden_layers=2, head_dim=32, num_key_value_heads=4, max_position_embeddings=8192)


@functools.cache
def one_layer(skewed: bool) -> Any:
    """Return a model of one such layer, whose router prefers one expert or not."""
    model = FAMILIES["qwen3_moe"].build(
        num_hidden_layers=1, head_dim=32, num_key_value_heads=4, max_position_embeddings=8192
    )
    if not skewed:
        return model
    model.model.embed_tokens.weight.data[:, 0] += 2
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[0] = 2
        layer.mlp.gate.weight.data[:, 0] = 0
        layer.mlp.gate.weight.data[0, 0] = 1.5
    return model


def memory(spread: Spread, skewed: bool) -> Any:
    """Return bytes after 4,000 tokens and some steps."""
    model = one_layer(skewed)
    cache = cache_for(model, spread, page_size=16, recent_window=128)
    read(model, cache, ids_of(4000))
    for step in range(20):
        read(model, cache, torch.tensor([[5 + step]]))
    report = cache.memory_report()
    tokens = [sum(layer.shard_tokens) for layer in report.layers]
    shards = [layer.shard_tokens for layer in report.layers]
    return {
        "bytes": report.total,
        "all": cache.total_nbytes,
        "window": sum(layer.window for layer in report.layers),
        "tokens": tokens,
        "shards": shards,
    }


class Calls:
    """Counts what is sent through torch.distributed, without asking the cache."""

    NAMES = ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "send", "isend", "all_to_all", "gather")

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def __enter__(self) -> "Calls":
        self._whole = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._whole.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self._whole.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            mine = args[1] if name == "all_gather" else args[0]
            self.sent.append((name, mine.numel() * mine.element_size()))
            return function(*args, **kwargs)

        return counted

    def take(self) -> list[tuple[str, int]]:
        """Return what was sent since this was last asked."""
        sent, self.sent = self.sent, []
        return sent


def traffic(spread: Spread, tokens: int) -> Any:
    """Return what each phase sends: a prompt, the first step after it, five more."""
    model = small_model()
    cache = cache_for(model, spread, page_size=32, recent_window=128)
    exchange = cache.layers[0].layout.exchange
    before = exchange.bytes_sent, exchange.collectives
    with Calls() as calls:
        read(model, cache, ids_of(tokens))
        prompt = calls.take()
        read(model, cache, torch.tensor([[5]]))
        first = calls.take()
        for step in range(5):
            read(model, cache, torch.tensor([[6 + step]]))
        steps = calls.take()
    counted = exchange.bytes_sent - before[0], exchange.collectives - before[1]
    return {"prompt": prompt, "first": first, "steps": steps, "counted": counted}


MEMORY: dict[str, Scenario] = {
    "memory": functools.partial(memory, skewed=False),
    "memory-skewed": functools.partial(memory, skewed=True),
}
TRAFFIC: dict[str, Scenario] = {f"traffic-{n}": functools.partial(traffic, tokens=n) for n in (512, 4096)}
