"""Small models and caches that are saved and loaded, with something read into them and a way to go on."""

import dataclasses
import functools
from typing import Any

import torch
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_list import row_count

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 3, "rank": 4}


@functools.cache
def shared_model(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> Any:
    options = {} if family == "gpt_oss" else {"num_hidden_layers": 2}
    return FAMILIES[family].build(**options).to(dtype)


def both(codec: str) -> dict[str, str]:
    return {"key_codec": codec, "value_codec": codec}


def new_cache(model: Any, **options: Any) -> PiKVCache:
    placement = "expert" if attachment_routers(model) else "hash"
    return PiKVCache.for_model(model, **{"placement": placement, **SMALL, **options})


def attachment_routers(model: Any) -> bool:
    return any(family.routed for family in FAMILIES.values() if family.model == type(model).__name__)


@torch.no_grad()
def read(model: Any, cache: PiKVCache, tokens: int = 120, batch: int = 2, seed: int = 1) -> PiKVCache:
    """Read random tokens; the last ones one by one."""
    ids = torch.randint(3, 190, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-3], past_key_values=cache)
    for step in range(3):
        model(ids[:, tokens - 3 + step :][:, :1], past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model: Any, cache: PiKVCache, mask: torch.Tensor | None = None, steps: int = 8) -> torch.Tensor:
    """Read a chunk of nine tokens, then go on greedily; returns the logits of every step, `(B, 1 + steps, V)`."""
    rows = row_count(cache.layers) or 1
    ids = torch.arange(5, 14).expand(rows, -1)
    logits = []
    for _ in range(1 + steps):
        seen = {}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            seen = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]}
        logits.append(model(ids, past_key_values=cache, **seen).logits[:, -1].float())
        ids = logits[-1].argmax(dim=-1, keepdim=True)
    return torch.stack(logits, dim=1)


def plain_state(layer: PiKVLayer) -> dict[str, Any]:
    """Return what a layer knows of its tokens, without arrays."""
    return {
        name: value
        for name, value in dataclasses.asdict(layer.state).items()
        if name not in ("padding", "expert_loads")
    }
