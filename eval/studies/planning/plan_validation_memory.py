"""How well plans predict bytes: real caches, whole and in parts, next to what was predicted."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.layer.layer_codecs import remember_queries
from pikv_hf.layer.taking_in import take_in
from pikv_hf.planning.cache_contents import CacheContents
from pikv_hf.planning.cache_memory import cache_bytes, part_bytes
from pikv_hf.planning.model_shape import ModelShape, shape_of

_SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 131072,
}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 2

#: Models with heads as large ones have them, and next to no feed-forward: config class, dtype of K/V, and options.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe, 4 x 128": (
        "Qwen3MoeConfig",
        "float32",
        {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 32}
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 32},
    ),
    "mixtral, 8 x 128": (
        "MixtralConfig",
        "bfloat16",
        {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8},
    ),
    "deepseek_v2, 8 x 192 / 128": (
        "DeepseekV2Config",
        "float32",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 16, "num_experts_per_tok": 2}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 32, **_LATENT},
    ),
    "gpt_oss, 8 x 64, half sliding": (
        "GptOssConfig",
        "bfloat16",
        {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 16}
        | {"num_experts_per_tok": 2, "sliding_window": 128, "layer_types": _HALF_SLIDING},
    ),
}

CODECS = ("none", "int8", "int4", "int2", "fp8", "lowrank")

#: Tokens, rows, and how many of the tokens are decoded one at a time.
SIZES = ((4096, 1, 0), (4096, 4, 0), (16384, 1, 0), (32768, 1, 0), (4096, 4, 256), (16384, 1, 256))

#: Of caches in parts: tokens, rows, parts.
PART_SIZES = ((4096, 1, 2), (4096, 4, 4), (16384, 1, 8))


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryCell:
    """One cache: what was predicted, and what `memory_report` counted."""

    model: str
    codec: str
    tokens: int
    batch: int
    generated: int
    predicted: int
    measured: int
    error: float


@dataclasses.dataclass(frozen=True, slots=True)
class PartCell:
    """One cache in several parts: bytes of one, predicted and measured on average, and how far the fullest is above."""

    model: str
    codec: str
    tokens: int
    batch: int
    parts: int
    predicted: int
    measured: int
    error: float
    fullest: float


def small_model(name: str) -> tuple[Any, ModelShape]:
    """Return one of :data:`MODELS` with random weights, and its shape."""
    config_class, dtype, options = MODELS[name]
    config = getattr(transformers, config_class)(**_SMALL, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model, shape_of(config, name, dtype=dtype)


@torch.no_grad()
def filled(model: Any, shape: ModelShape, tokens: int, batch: int, generated: int = 0, **options: Any) -> PiKVCache:
    """Return a cache of random K/V whose experts are as likely as each other: a prompt, then single tokens."""
    cache = PiKVCache.for_model(model, **options)
    dtype = getattr(torch, shape.dtype)
    for new in [tokens - generated, *[1] * generated]:
        for index, (layer, geometry) in enumerate(zip(cache.layers, shape.layers, strict=True)):
            keys = torch.randn(batch, geometry.kv_heads, new, geometry.key_dim, dtype=dtype)
            values = torch.randn(batch, geometry.kv_heads, new, geometry.value_dim, dtype=dtype)
            # Of the cache's own `update` all that no forward of the model calls is stored by position, and expanded.
            if geometry.sliding is not None:
                cache.update(keys, values, index)
            else:
                take_in(layer, keys, values, in_place=True)
                layer.attend_begins(None)
                remember_queries(
                    layer.store,
                    torch.randn(batch, geometry.query_heads, min(new, 16), geometry.key_dim, dtype=dtype),
                    1,
                )
                if layer.has_expert_router:
                    layer.record_experts(torch.randint(0, geometry.experts, (batch * new,)))
    return cache


def memory_cells(
    models: Iterable[str] = MODELS, codecs: Sequence[str] = CODECS, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> Iterator[MemoryCell]:
    """Fill caches and compare their bytes with what is predicted."""
    for name in models:
        model, shape = small_model(name)
        for codec in codecs:
            options = PiKVConfig(key_codec=codec, value_codec=codec)
            for tokens, batch, generated in sizes:
                cache = filled(model, shape, tokens, batch, generated, key_codec=codec, value_codec=codec)
                measured = cache.memory_report().total
                contents = CacheContents(tokens, batch, options, generated)
                predicted = int(cache_bytes(shape, contents).total)
                yield MemoryCell(name, codec, tokens, batch, generated, predicted, measured, predicted / measured - 1)


def part_cells(
    models: Iterable[str] = MODELS,
    codecs: Sequence[str] = ("none", "int4"),
    sizes: Sequence[tuple[int, int, int]] = PART_SIZES,
) -> Iterator[PartCell]:
    """Fill caches of several parts on one CPU and compare the bytes of a part with what is predicted."""
    for name, codec in itertools.product(models, codecs):
        model, shape = small_model(name)
        if shape.paged_layers != shape.layers:
            # All parts of a process share its sliding layers, which are no part's.
            continue
        options = PiKVConfig(key_codec=codec, value_codec=codec)
        for tokens, batch, parts in sizes:
            devices = [f"cpu:{number}" for number in range(parts)]
            cache = filled(model, shape, tokens, batch, key_codec=codec, value_codec=codec, devices=devices)
            measured = list(cache.memory_report().per_device.values())
            error, fullest = part_errors(measured, shape, tokens, batch, options)
            mean = statistics.fmean(measured)
            yield PartCell(name, codec, tokens, batch, parts, int(mean * (1 + error)), int(mean), error, fullest)


def part_errors(
    measured: Sequence[int],
    shape: ModelShape,
    tokens: int,
    batch: int,
    options: PiKVConfig,
    *,
    processes: bool = True,
    generated: int = 0,
) -> tuple[float, float]:
    """Compare the bytes of the parts of one cache, on several devices or in several processes, with predictions.

    Parameters
    ----------
    measured : sequence of int
        Bytes of each part.
    shape, tokens, batch, options, processes, generated
        As in :func:`pikv_hf.planning.cache_memory.part_bytes`.

    Returns
    -------
    tuple of float
        Relative errors of the prediction for the mean of the parts, and how far the fullest is above that mean.

    Raises
    ------
    ValueError
        Without parts.
    """
    if not measured:
        raise ValueError("measured must have the bytes of at least one part, got none")
    contents = CacheContents(tokens, batch, options, generated)
    parts = part_bytes(shape, contents, len(measured), processes=processes)
    mean = statistics.fmean(measured)
    return parts.total / mean - 1, max(measured) / mean - 1
