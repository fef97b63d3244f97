"""Time a decoding step of latent attention (MLA) at DeepSeek-V3's geometry against `DynamicCache`, in one run.

The attention module runs whole, projections included, in a model of one layer whose feed-forward and vocabulary are
small. Caches are filled with random latents: no prompt of 32,768 tokens is read.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument

from .decode import Comparison, compared, timed

#: What is timed: codecs of latents and of rotary keys, and routing.
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8": {"key_codec": "int8", "value_codec": "int8"},
    "int4": {"key_codec": "int4", "value_codec": "int8"},
    "page_bound": {"routing": "page_bound", "max_pages": 0.25},
}

#: What is timed where an indexer chooses the tokens: other routing would choose again.
INDEXED_CASES = ("exact", "int8", "int4")

#: Seconds of steps of PiKV in each case, and the least steps of either cache.
SECONDS, LEAST = 4.0, 3

#: DeepSeek-V3's attention (arXiv 2412.19437).
GEOMETRY = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
#: Of DeepSeek-V3.2's indexer (arXiv 2512.02556).
INDEXER = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}


def has_indexers() -> bool:
    """Return whether the installed transformers knows DeepSeek-V3.2."""
    return hasattr(transformers, "DeepseekV32Config")


def latent_model(indexed: bool = False, **geometry: int) -> Any:
    """Return a random DeepSeek-V3 of one layer, or V3.2, of :data:`GEOMETRY` with the changes given."""
    name = "DeepseekV32" if indexed else "DeepseekV3"
    config_class: Any = getattr(transformers, f"{name}Config")
    model_class: Any = getattr(transformers, f"{name}ForCausalLM")
    config = config_class(
        **{**GEOMETRY, **({"mlp_layer_types": ["dense"], **INDEXER} if indexed else {}), **geometry},
        vocab_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        max_position_embeddings=1 << 18,
        rope_scaling=None,
    )
    return model_class(config).eval()


@torch.no_grad()
def run_latent_decode(
    contexts: Sequence[int],
    cases: Sequence[str] = tuple(CASES),
    seconds: float = SECONDS,
    dtype: str = "float32",
    indexed: bool = False,
    **geometry: int,
) -> Iterator[Comparison]:
    """Time one decoding step of a layer of latent attention.

    Parameters
    ----------
    contexts : sequence of int
        Cached tokens.
    cases : sequence of str
        Of :data:`CASES`; each has a turn of its own, after `DynamicCache`.
    seconds : float
        Time to spend on each case; at least :data:`LEAST` steps of each cache are taken.
    dtype : str
        Of the model.
    indexed : bool
        Whether it is DeepSeek-V3.2, whose indexer chooses 2,048 tokens for each query.
    **geometry
        In place of :data:`GEOMETRY` and :data:`INDEXER`.
    """
    model, kind = latent_model(indexed, **geometry).to(getattr(torch, dtype)), "dsa" if indexed else "mla"
    for tokens in contexts:
        torch.manual_seed(0)
        filled = _filled(model, tokens)
        steps = torch.randint(0, 512, (1 << 10, 1, 1))
        detach(model)
        # Steps add tokens to a cache: what is timed and what is copied are two.
        theirs, expected = _timed_steps(model, copy.deepcopy(filled), steps, seconds)
        plain = None
        for name in cases:
            cache = PiKVCache.from_cache(model, filled, placement="hash", **CASES[name])
            ours, outs = _timed_steps(model, cache, steps, seconds)
            difference = max(float((out - other).abs().max()) for out, other in zip(outs, expected, strict=False))
            case = compared(f"{kind} {name}", 1, tokens, ours[1:], theirs[1:], difference)
            plain = case.pikv.p50 if name == "exact" else plain
            to_none = None if plain is None else case.pikv.p50 / plain
            routing = CASES[name].get("routing", "all")
            routing = routing if routing == "all" else f"{routing}:{CASES[name]['max_pages']}"
            codecs = [CASES[name].get(which, "none") for which in ("key_codec", "value_codec")]
            codec = "/".join(dict.fromkeys(codecs))
            yield dataclasses.replace(case, codec=codec, to_none=to_none, kv_bytes=cache.nbytes, routing=routing)


def _filled(model: Any, tokens: int) -> DynamicCache:
    """Return a cache of so many random tokens, of the shapes that the model's attention caches."""
    probe, filled = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(torch.zeros((1, 1), dtype=torch.int64), **cache_argument(probe))
    layer: Any = probe.layers[0]
    keys, values = (
        torch.randn(1, part.shape[1], tokens, part.shape[3]).to(part.dtype) for part in (layer.keys, layer.values)
    )
    filled.update(keys, values, 0)
    if (index := getattr(layer, "indexer_keys", None)) is not None:
        own: Any = filled
        own.update_indexer(torch.randn(1, tokens, index.shape[2]).to(index.dtype), 0)
    return filled


def _timed_steps(model: Any, cache: Any, steps: torch.Tensor, seconds: float) -> tuple[list[float], list[torch.Tensor]]:
    """Return the seconds of steps, the first of which pays for allocations, and the logits of the first steps."""
    spent: list[float] = []
    outs: list[torch.Tensor] = []
    started = time.perf_counter()
    for step in steps:
        took, out = timed(model, step, **cache_argument(cache))
        spent.append(took)
        if len(outs) <= LEAST:
            outs.append(out.logits)
        if len(spent) > LEAST and time.perf_counter() - started > seconds:
            break
    return spent, outs
