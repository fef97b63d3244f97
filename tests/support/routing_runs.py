"""Runs with routing that chooses everything, and layers brought into states that routing depends on."""

from typing import Any

import torch
from fake_attachment import GROUPS, HEADS, KEY_DIM, VALUE_DIM
from routing_reference import grow, grown

from pikv_hf.config import ROUTINGS
from pikv_hf.layer.layer import PiKVLayer

SMALL = {"page_size": 8, "recent_window": 16, "num_shards": 4}
# Goes through the routed path and chooses every page.
EVERYTHING = {"routing": "adaptive", "coverage": 1.0, "max_pages": 1.0}
POLICIES = [name for name in ROUTINGS if name != "all"]


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> Any:
    fixed = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, past_key_values=cache, **{**fixed, **options})


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def queries(layer: PiKVLayer) -> torch.Tensor:
    return torch.randn(layer.batch, HEADS * GROUPS, KEY_DIM)


def kept_by_head(layer: PiKVLayer, share: float = 0.7) -> None:
    """Evict tokens, each head others; sinks and recent tokens stay."""
    kept = torch.rand(layer.batch, HEADS, layer.seen) < share
    kept[..., : layer.config.sink_tokens] = kept[..., -layer.config.recent_window :] = True
    layer.keep(kept)


def in_state(state: str, **options: Any) -> PiKVLayer:
    if state == "packed":
        return grown(padding=40, key_codec="auto", value_codec="auto", error_budget=0.04, **options)
    if state == "no window":
        return grown(padding=20, recent_window=0, sink_tokens=0, **options)
    layer = grown(padding=60 if state == "padded" else 0, batch=3 if state == "padded" else 2, **options)
    if state == "lanes":
        kept_by_head(layer)
    elif state == "mixed widths":
        layer.keep(torch.tensor([0, 4, 8, 16])[torch.randint(0, 4, (2, HEADS, layer.seen))])
    elif state == "cropped":
        layer.crop(121)
    elif state == "rebuilt, grown again":
        layer.keys, layer.values = torch.randn(2, HEADS, 120, KEY_DIM), torch.randn(2, HEADS, 120, VALUE_DIM)
        for _ in range(30):
            grow(layer, 1)
    return layer
