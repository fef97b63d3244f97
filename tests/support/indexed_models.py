"""Tiny models whose own indexer chooses the tokens that attention reads, and caches of them."""

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model
from pikv_hf.layer.indexed_layer import IndexedLayer
from pikv_hf.layer.own_layer import INDEXED_LAYER, indexer_keys_of

#: Tokens that each query reads.
TOP = 16
LATENT = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4")
#: Chooses blocks of tokens, for each group of heads others, without a look at masks.
BLOCKS = "minimax_m3_vl_text"
NAMES = sorted({*LATENT, BLOCKS} & set(CLASSES))
SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}

needs_indexers = pytest.mark.skipif(INDEXED_LAYER is None, reason="this transformers' caches hold no indexer keys")


@functools.cache
def model_of(name: str) -> Any:
    # Layers that have no indexer read what the layer before them has chosen.
    shared = {"indexer_types": ["full", "shared", "full"]} if name in ("glm_moe_dsa", "hy_v4") else {}
    return tiny_model(name, **({} if name == BLOCKS else {"index_topk": TOP}), **shared)


def new_cache(name: str, **options: Any) -> PiKVCache:
    return PiKVCache.for_model(model_of(name), **{**SMALL, **options})


def dynamic(name: str) -> Any:
    return DynamicCache(config=model_of(name).config)


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(name: str, cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a call, `(B, Q, V)`."""
    with torch.no_grad():
        logits: torch.Tensor = model_of(name)(tokens, attention_mask=mask, **cache_argument(cache)).logits
    return logits


def assert_same_tokens(ours: PiKVCache, theirs: Any) -> None:
    """Compare all that layers hold of tokens; what both have computed differs by rounding."""
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        pairs = [(mine.keys, other.keys), (mine.values, other.values)]
        pairs += [(mine.indexer_keys, indexer_keys_of(other))] if isinstance(mine, IndexedLayer) else []
        for left, right in pairs:
            torch.testing.assert_close(left, right, atol=1e-3, rtol=0)
