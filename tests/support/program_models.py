"""The models and caches of programs: families at their smallest, one pair of models per process."""

import functools
import os
from typing import Any

import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig, detach

#: Two layers, and windows that prompts of a few tokens fill.
SMALLEST: dict[str, dict[str, Any]] = {
    "mixtral_sliding": {"sliding_window": 10},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10},
    "llama4": {"no_rope_layers": [1, 0], "attention_chunk_size": 12},
    "dbrx": {"n_layers": 2},
}
#: The only attention that some can be compared with: gpt-oss has no sdpa, of Llama-4 eager differs from sdpa, and so
#: does what sliding layers keep of padding, which a mask may show later.
ATTENTION = {"gpt_oss": "eager", "llama4": "sdpa", "mixtral_sliding": "sdpa"}


#: What says how many experts a token has, by its names in the configs of families.
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")


def build(family: str, all_experts: bool = False) -> Any:
    """Return a random model of a family, with two layers; one that takes all experts chooses none by rounding."""
    options = {"num_hidden_layers": 2, **SMALLEST.get(family, {})}
    if all_experts:
        given = FAMILIES[family].options
        options |= dict.fromkeys((name for name in CHOSEN if name in given), 8)
        options |= {"topk_group": given["n_group"]} if "n_group" in given else {}
        options |= {"ffn_config": {**given["ffn_config"], "moe_top_k": 8}} if "ffn_config" in given else {}
    return FAMILIES[family].build(**options)


@functools.cache
def _built(family: str, all_experts: bool, attached: bool) -> Any:
    model = build(family, all_experts)
    model.pristine = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model


def model_of(family: str, all_experts: bool, attention: str, attached: bool) -> Any:
    """Return the process's model of a family, as it was built; `attached` tells PiKV's from DynamicCache's own."""
    model = _built(family, all_experts, attached)
    detach(model)
    model.set_attn_implementation(attention)
    if model.dtype != torch.float32:
        model.to(torch.float32).load_state_dict(model.pristine)
    return model


@functools.cache
def assistant_of(family: str, all_experts: bool) -> Any:
    """Return a model that mostly agrees with the family's."""
    model = build(family, all_experts)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.004)
    return model


def new_cache(model: Any, pikv: bool, attached: bool, devices: list[str] | None, options: dict[str, Any]) -> Any:
    """Return a cache of these options, for an attached model or from its config alone, or what it is compared with."""
    if not pikv:
        # Sliding layers that keep everything slide in the mask alone.
        return DynamicCache() if options.get("sliding_layers") == "paged" else DynamicCache(config=model.config)
    if attached:
        return PiKVCache.for_model(model, devices=devices, **options)
    return PiKVCache(model.config, PiKVConfig(**options))


def quiet() -> None:
    """Say nothing about what programs do on purpose."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
