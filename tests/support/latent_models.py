"""Tiny models with latent attention, and caches of them."""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model
from pikv_hf.integration.latent_attention import expands_latents

#: Model types with latent attention, of those that this release of transformers has.
LATENT = sorted(
    {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu", "mistral4", "axk1"} & set(CLASSES)
)

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}


def attention_of(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if expands_latents(type(module))]


caches_latents = bool(attention_of(tiny_model("deepseek_v3")))
needs_latents = pytest.mark.skipif(not caches_latents, reason="this transformers caches expanded keys and values")


@functools.cache
def model_of(name: str) -> Any:
    return tiny_model(name, num_key_value_heads=4)


def new_cache(name: str, **options: Any) -> PiKVCache:
    # Youtu has no experts, and so no router.
    dense = {"placement": "hash"} if name == "youtu" else {}
    return PiKVCache.for_model(model_of(name), **{**SMALL, **options, **dense})


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(name: str, cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a call, `(B, Q, V)`."""
    logits: torch.Tensor = model_of(name)(tokens, attention_mask=mask, **cache_argument(cache)).logits
    return logits
