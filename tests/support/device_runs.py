"""Small models with caches on several devices of the processor, and a check that tokens are spread over them."""

import functools
from typing import Any

import torch
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_reads import stored_mask

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}
#: Of families whose layers differ from one to the next.
LAYERED = ("gpt_oss", "llama4")


def cpus(number: int) -> list[str]:
    return [f"cpu:{index}" for index in range(number)]


@functools.cache
def shared_model(family: str = "qwen3_moe") -> Any:
    """Return a model of two layers, if its layers are alike, that tests leave as it is."""
    return FAMILIES[family].build(**({} if family in LAYERED else {"num_hidden_layers": 2}))


@functools.cache
def single_layer() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=1)


def spread(model: Any, devices: int | list[str], family: str = "qwen3_moe", **options: Any) -> PiKVCache:
    placement = "expert" if FAMILIES[family].routed else "hash"
    names = cpus(devices) if isinstance(devices, int) else devices
    return PiKVCache.for_model(model, devices=names, **{**SMALL, "placement": placement, **options})


def paged_layers(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


def assert_spread(cache: PiKVCache) -> None:
    """All devices have a part of the shards, and every token is in one of them."""
    for layer in paged_layers(cache):
        layer.settle()
        held = sum(table.view.stored_mask(layer.seen).long() for table in layer.store.tables())
        assert torch.equal(
            held.view(layer.batch, layer.store.lanes, -1).expand(-1, layer.store.heads, -1),
            stored_mask(layer.store).long(),
        )
        # Heads that keep different tokens have more pages than devices have.
        assert len({id(table.plain) for table in layer.store.tables()}) == layer.layout.parts
