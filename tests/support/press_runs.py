"""Running this project's presses on small random models, and looking at what they left."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.presses import DuoPress, ExpertPress, LoRAPress, PiKVPress, PyramidPress, QueryAwarePress

#: So small that a hundred tokens fill many pages.
OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}

#: Presses that evict and change no token, for half of a context.
EVICTING: dict[str, Any] = {
    "query_aware": lambda **given: QueryAwarePress(window=8, **given),
    "paged": lambda **given: QueryAwarePress(window=8, page_size=6, **given),
    "pyramid": lambda **given: PyramidPress(window=8, **given),
    "headwise": lambda **given: PyramidPress(window=8, headwise=True, **given),
    "duo": lambda **given: DuoPress(recent_tokens=8, **given),
    "expert": lambda **given: ExpertPress(window=8, **given),
    "random_router": lambda **given: ExpertPress(window=8, router="random", **given),
}
#: All of them.
PRESSES: dict[str, Any] = {**EVICTING, "pikv": PiKVPress, "lora": lambda **given: LoRAPress(recent_tokens=16, **given)}


@functools.cache
def shared_model(family: str = "qwen3_moe") -> Any:
    """Return a model that tests leave as it is."""
    return FAMILIES[family].build()


def ids_of(tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Return random tokens, `(batch, tokens)`."""
    return torch.randint(3, 190, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], seed: int = 1) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return rows `(1, n)` of these lengths, and the left-padded batch of them with its mask."""
    rows = [ids_of(length, seed=seed + index) for index, length in enumerate(lengths)]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return rows, ids, mask


def attached(model: Any, **options: Any) -> PiKVCache:
    """Return a cache that the model reads in place."""
    return PiKVCache.for_model(model, **{"placement": "hash", **OPTIONS, **options})


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor, press: Any = None, mask: torch.Tensor | None = None) -> Any:
    """Read a context through a press, padding having no positions; returns the cache."""
    at = None if mask is None else (mask.cumsum(dim=-1) - 1).clamp_min(0)
    with nullcontext() if press is None else press(model):
        model.model(ids, past_key_values=cache, attention_mask=mask, position_ids=at)
    return cache


@torch.no_grad()
def ask_rows(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of `(1, n)` tokens after a padded context, the same in every row, `(B, n, V)`."""
    rows, new = mask.shape[0], ids.shape[1]
    after = torch.nn.functional.pad(mask, (0, new), value=1)
    at = mask.sum(dim=-1, keepdim=True) + torch.arange(new)
    return model(ids.expand(rows, -1), past_key_values=cache, attention_mask=after, position_ids=at).logits


@torch.no_grad()
def next_logits(model: Any, cache: Any, position: int, steps: int = 3) -> torch.Tensor:
    """Return the logits of a few tokens that follow the context, one by one, `(B, steps, V)`."""
    rows = cache.layers[0].batch if isinstance(cache, PiKVCache) else cache.layers[0].keys.shape[0]
    logits = []
    for step in range(steps):
        at = torch.full((rows, 1), position + step)
        token = torch.full((rows, 1), 7 + step)
        logits.append(model(token, past_key_values=cache, position_ids=at).logits[:, -1])
    return torch.stack(logits, dim=1)


def held_by(cache: PiKVCache) -> list[torch.Tensor]:
    """Return which columns each layer holds, `(B, H, T)` bool."""
    return [layer.stored_mask() for layer in cache.layers if not layer.is_sliding]


def kept_columns(model: Any, ids: torch.Tensor, press: Any, cache: Any, mask: Any = None) -> list[torch.Tensor]:
    """Read through a press that only evicts; returns the columns kept by each layer, `(B, H, T)` bool.

    What a `DynamicCache` keeps is found by its keys and by the marks that hide tokens.
    """
    whole = read(model, DynamicCache(config=model.config), ids, mask=mask)
    read(model, cache, ids, press, mask)
    if isinstance(cache, PiKVCache):
        return held_by(cache)
    kept = []
    for layer, before, block in zip(cache.layers, whole.layers, model.model.layers, strict=True):
        same = (before.keys.unsqueeze(3) == layer.keys.unsqueeze(2)).all(dim=-1).any(dim=-1)
        if (marks := getattr(block.self_attn, "masked_key_indices", None)) is not None:
            same[tuple(marks)] = False
        kept.append(same)
    return kept
