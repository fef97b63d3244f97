"""How well plans predict: bytes against real caches, times of a step against `pikv bench decode`, in the same run.

    python -m pikv_hf.eval.plan_validation --output eval/results/plan-validation.json

The device that times are predicted for is measured by `pikv_hf.planning.calibration`, anew before every measurement, on
tensors of its own; nothing is fitted to the times that are compared.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.planning.cache_memory import cache_bytes, part_bytes
from pikv_hf.planning.calibration import calibrated_cpu
from pikv_hf.planning.hardware import Device
from pikv_hf.planning.model_shape import ModelShape, shape_of
from pikv_hf.planning.step_time import layer_seconds
from pikv_hf.report import format_bytes

from .bench import geometry_model, run_decode
from .bench_view import WIDTH
from .plan_view import table
from .provenance import provenance

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

#: Of times: codec, routing.
KINDS = (("none", "all"), ("int8", "all"), ("int4", "all"), ("none", "page_bound"))

#: What predictions are to keep to.
MEMORY_BOUND, TIME_BOUND = 0.02, 1.5


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
class TimeCell:
    """One size: predicted and measured seconds of a layer's step, medians over rounds, and of each round."""

    codec: str
    routing: str
    tokens: int
    batch: int
    predicted: float
    measured: float
    ratio: float
    rounds: tuple[tuple[float, float], ...]


# Memory


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
            cache.update(keys, values, index)
            if geometry.sliding is None:
                layer.attend_begins(None)
                layer.observe(torch.randn(batch, geometry.query_heads, min(new, 16), geometry.key_dim, dtype=dtype), 1)
                if layer.routed:
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
                predicted = int(cache_bytes(shape, tokens, batch, options, generated=generated).total)
                yield MemoryCell(name, codec, tokens, batch, generated, predicted, measured, predicted / measured - 1)


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
    parts = part_bytes(shape, tokens, batch, options, len(measured), processes=processes, generated=generated)
    mean = statistics.fmean(measured)
    return parts.total / mean - 1, max(measured) / mean - 1


# Time


def time_cells(
    contexts: Sequence[int], batches: Sequence[int], rounds: int, seconds: float, max_pages: int
) -> Iterator[tuple[TimeCell, Device]]:
    """Predict and measure the time of a layer's step; yield each cell with the last measured device."""
    shape = shape_of(geometry_model().config, "the benchmark's layer", dtype="float32")
    for tokens in contexts:
        for batch in batches:
            pairs: dict[tuple[str, str], list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for _ in range(rounds):
                for kind in KINDS:
                    # Just before what it predicts: other programs may share the machine.
                    device = calibrated_cpu()
                    predicted = _predicted(shape, tokens, batch, *kind, max_pages, device)
                    case = next(run_decode([tokens], [batch], seconds, [kind[0]], kind[1], max_pages))
                    pairs[kind].append((predicted, case.pikv.p50))
            for (codec, routing), found in pairs.items():
                predicted, measured = (statistics.median(each) for each in zip(*found, strict=True))
                name = routing if routing == "all" else f"{routing}:{max_pages}"
                cell = TimeCell(codec, name, tokens, batch, predicted, measured, predicted / measured, tuple(found))
                yield cell, device


def _predicted(
    shape: ModelShape, tokens: int, batch: int, codec: str, routing: str, max_pages: int, device: Device
) -> float:
    options = PiKVConfig(key_codec=codec, value_codec=codec, routing=routing, max_pages=max_pages)
    return layer_seconds(shape.layers[0], tokens, batch, options, shape.dtype, device)


# Running it


def summary(memory: Sequence[MemoryCell], times: Sequence[TimeCell]) -> dict[str, Any]:
    """Return how many cells keep to the bounds, and the worst."""
    errors = [abs(cell.error) for cell in memory]
    factors = [max(cell.ratio, 1 / cell.ratio) for cell in times]
    return {
        "memory": {
            "bound": MEMORY_BOUND,
            "cells": len(errors),
            "within": sum(error <= MEMORY_BOUND for error in errors),
            "mean": statistics.fmean(errors) if errors else None,
            "worst": max(errors, default=None),
        },
        "time": {
            "bound": TIME_BOUND,
            "cells": len(factors),
            "within": sum(factor <= TIME_BOUND for factor in factors),
            "median": statistics.median(factors) if factors else None,
            "worst": max(factors, default=None),
            "beyond": [
                f"{c.codec}, {c.routing}, {c.tokens} x {c.batch}: {c.ratio:.2f}"
                for c, factor in zip(times, factors, strict=True)
                if factor > TIME_BOUND
            ],
        },
    }


def _show(console: Console, memory: Sequence[MemoryCell], times: Sequence[TimeCell]) -> None:
    if memory:
        shown = table(
            "Bytes of caches", "model, codec", "tokens", "batch", "generated", "predicted", "measured", "error"
        )
        for cell in memory:
            sizes = f"{cell.tokens:,}", str(cell.batch), str(cell.generated)
            figures = format_bytes(cell.predicted), format_bytes(cell.measured), f"{cell.error:+.2%}"
            shown.add_row(f"{cell.model}, {cell.codec}", *sizes, *figures)
        console.print(shown)
    if times:
        shown = table(
            "Milliseconds of a layer's step", "codec, routing", "tokens", "batch", "predicted", "measured", "ratio"
        )
        for each in times:
            figures = f"{each.predicted * 1e3:.2f}", f"{each.measured * 1e3:.2f}", f"{each.ratio:.2f}"
            shown.add_row(f"{each.codec}, {each.routing}", f"{each.tokens:,}", str(each.batch), *figures)
        console.print(shown)


def main(argv: list[str] | None = None) -> None:
    """Run both comparisons, print their tables and write their cells."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.plan_validation", description=__doc__)
    parser.add_argument("--output", type=Path, help="file for the results, eval/results/plan-validation.json")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="times that each step is predicted and measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each measurement, at least")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 32768, 131072], help="contexts of the times")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4], help="rows of the times")
    parser.add_argument("--max-pages", type=int, default=64, help="that routing reads")
    parser.add_argument("--no-memory", action="store_true", help="compare times alone")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(highlight=False, width=WIDTH, log_path=False)
    memory = [] if arguments.no_memory else list(memory_cells())
    times: list[TimeCell] = []
    device: Device | None = None
    for cell, measured_device in time_cells(
        arguments.tokens, arguments.batch, arguments.rounds, arguments.seconds, arguments.max_pages
    ):
        console.log(f"{cell.codec}, {cell.routing}, {cell.tokens:,} x {cell.batch}: {cell.ratio:.2f}")
        times.append(cell)
        device = measured_device
    _show(console, memory, times)
    found = summary(memory, times)
    console.print(found)
    if arguments.output is not None:
        result = {
            **provenance(),
            "summary": found,
            "calibrated": None if device is None else device.to_dict(),
            "memory": [dataclasses.asdict(cell) for cell in memory],
            "times": [dataclasses.asdict(cell) for cell in times],
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
