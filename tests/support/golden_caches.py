"""The caches of the golden files: one small cache for each thing that a file can hold, the same on every machine.

Weights and tokens follow from their names and indices in integer arithmetic: no random generator, and so no release of
torch or numpy, changes them. The options are written out, so that a changed default does not change what is saved.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from safetensors.torch import load_file, save_file

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.layer.layer_list import row_count

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB = 64
TOKENS, STEPS = 44, 8

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": False,
}
QWEN: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
}
GPT_OSS: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "intermediate_size": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}

LAYOUT: dict[str, Any] = {
    "page_size": 8,
    "recent_window": 8,
    "sink_tokens": 4,
    "num_shards": 2,
    "placement": "expert",
}


def hashed(name: str, size: int) -> np.ndarray:
    """Return `size` multiples of 2 ** -15 between -1 and 1 that look random and depend on a name only, float32."""
    mixed = np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed >> np.uint32(16)).astype(np.float32) / np.float32(2**15) - 1


def golden_model(family: str = "Qwen3Moe") -> Any:
    """Return the model of the golden files, in float32."""
    options = QWEN if family == "Qwen3Moe" else GPT_OSS
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        numbers = torch.from_numpy(hashed(name, parameter.numel())).view(parameter.shape)
        scale = 0.25 if parameter.ndim == 1 else 1.0 if "gate.weight" in name or "router" in name else 0.375
        parameter.data = numbers * scale + (1.0 if "norm" in name else 0.0)
    return model


def tokens_of(name: str, rows: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    """Return `(rows, tokens)` token ids that depend on a name only."""
    return torch.from_numpy((hashed(name, rows * tokens) * 2**15).astype(np.int64) % VOCAB).view(rows, tokens)


@torch.no_grad()
def read(model: Any, cache: PiKVCache, kind: str, tokens: int = TOKENS) -> PiKVCache:
    """Read tokens, the last three one by one."""
    ids = tokens_of(kind, tokens=tokens)
    model(ids[:, :-3], past_key_values=cache)
    for step in range(tokens - 3, tokens):
        model(ids[:, step : step + 1], past_key_values=cache)
    # What was not written yet is, as it would be before saving.
    cache.memory_report()
    return cache


@torch.no_grad()
def go_on(model: Any, cache: PiKVCache, chunk: list[int]) -> tuple[list[list[int]], float]:
    """Read a chunk and go on greedily; return the tokens of each step, and by how much they won at least."""
    tokens, margin = [], float("inf")
    ids = torch.tensor(chunk).expand(row_count(cache.layers) or 1, -1)
    padding = next((layer.state.padding for layer in cache.layers if hasattr(layer, "state")), None)
    for _ in range(STEPS):
        mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        if padding is not None:
            mask[:, : padding.shape[1]] -= torch.from_numpy(padding).long()
        best = model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1].topk(2)
        margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
        ids = best.indices[:, :1]
        tokens.append(ids[:, 0].tolist())
    return tokens, margin


def dense(cache: PiKVCache) -> dict[str, torch.Tensor]:
    """Return the keys and values of each layer as attention sees them, by name."""
    found = {}
    for index, layer in enumerate(cache.layers):
        pair = layer.dense() if hasattr(layer, "dense") else (layer.keys, layer.values)
        found |= {f"{index}.{name}": each.contiguous() for name, each in zip(("keys", "values"), pair, strict=True)}
    return found


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return a checksum of the shape and of every bit of each tensor."""
    return {
        name: f"{list(tensor.shape)} {xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes())}"
        for name, tensor in tensors.items()
    }


# The kinds


def _simple(tokens: int = TOKENS, **options: Any) -> Callable[[Any, str], PiKVCache]:
    return lambda model, kind: read(model, PiKVCache.for_model(model, **{**LAYOUT, **options}), kind, tokens)


def _padded(model: Any, kind: str) -> PiKVCache:
    """Two rows, the first of which begins with seven columns of padding."""
    cache = PiKVCache.for_model(model, **LAYOUT)
    ids = tokens_of(kind, 2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    cache.memory_report()
    return cache


def _shared(model: Any, kind: str) -> PiKVCache:
    """Pages chosen by their bounds, which the last call has found; two rows have one sequence."""
    cache = _simple(routing="page_bound", max_pages=2)(model, kind)
    cache.batch_repeat_interleave(2)
    return cache


def _assigned(model: Any, kind: str) -> PiKVCache:
    """Keys and values of fewer tokens than the model has seen, given from outside."""
    cache = _simple()(model, kind)
    for layer in cache.layers:
        keys, values = layer.keys[:, :, ::2].clone(), layer.values[:, :, ::2].clone()
        layer.keys, layer.values = keys, values
    return cache


def _lanes(model: Any, kind: str) -> PiKVCache:
    """Heads that keep different tokens."""
    cache = _simple(key_codec="auto", value_codec="int8")(model, kind)
    for index, layer in enumerate(cache.layers):
        kept = torch.from_numpy(hashed(f"{kind}.{index}", 2 * layer.seen)).view(1, 2, -1) < 0.4
        layer.keep(kept)
    return cache


def _config_alone(model: Any, kind: str) -> PiKVCache:
    """A cache that never sees the model."""
    return read(model, PiKVCache(model.config, PiKVConfig(**{**LAYOUT, "placement": "hash"})), kind)


def _parts(model: Any, kind: str) -> PiKVCache:
    options = {**LAYOUT, "placement": "balanced", "num_shards": 3, "budget": 48, "scheduler": "h2o"}
    return read(model, PiKVCache.for_model(model, devices=["cpu:0", "cpu:1"], **options), kind, tokens=64)


def _process(model: Any, kind: str) -> PiKVCache:
    options = {**LAYOUT, "key_codec": "int8", "value_codec": "int8"}
    return read(model, PiKVCache.for_model(model, process_group="world", timeout=60, **options), kind)


#: How each cache is made, by its kind. All are of the Qwen3Moe model but `sliding`.
KINDS: dict[str, Callable[[Any, str], PiKVCache]] = {
    "plain": _simple(),
    "padded": _padded,
    "int4": _simple(key_codec="int4", value_codec="int4"),
    "lowrank": _simple(tokens=80, key_codec="lowrank", value_codec="lowrank+int4", rank=4),
    "budget": _simple(budget=36, scheduler="quest"),
    # So large that nothing is decided: what it would be decided by may get better.
    "joint": _simple(budget=400, scheduler="joint"),
    "tiers": _simple(tiers={"cpu": "2KiB", "disk": None}, scheduler="pikv"),
    "routing": _shared,
    "code_bounds": _simple(
        **{"routing": "page_bound", "max_pages": 2, "key_codec": "int4", "value_codec": "int4"},
        **{"tiers": {"cpu": "4KiB", "disk": None}, "tokens": 80},
    ),
    "sliding": _simple(key_codec="int8", value_codec="fp8", placement="hash"),
    "assigned": _assigned,
    "config_alone": _config_alone,
    "lanes": _lanes,
    "parts": _parts,
    "processes": _process,
}
#: Where a kind that is in several parts is loaded.
PLACES: dict[str, dict[str, Any]] = {
    "parts": {"devices": ["cpu:2", "cpu:3"]},
    "processes": {"process_group": "world", "timeout": 60},
}
#: Kinds whose keys and values a codec has changed: decoding them may differ in a last bit between processors.
CODED = ("int4", "lowrank", "code_bounds", "sliding", "lanes", "processes")


def model_of(kind: str) -> Any:
    """Return the model that a kind was saved with."""
    return golden_model("GptOss" if kind == "sliding" else "Qwen3Moe")


def load(model: Any, folder: Path, kind: str) -> PiKVCache:
    """Load the golden file of a kind."""
    return PiKVCache.load(cache_file(folder, kind), model, **PLACES.get(kind, {}))


# What a cache should turn out to hold


def cache_file(folder: Path, kind: str) -> Path:
    """Return what the cache of a kind was saved to."""
    return folder / f"{kind}.safetensors"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cache held, and what the model said when it went on after some tokens more.

    Attributes
    ----------
    chunk : list of int
        The tokens that it read.
    tokens : list of list of int
        Those that it chose, for each step and row.
    seen : int
        Positions before.
    digests : dict
        A checksum of the keys and of the values of each layer.
    dense : dict
        These keys and values.
    """

    chunk: list[int]
    tokens: list[list[int]]
    seen: int
    digests: dict[str, str]
    dense: dict[str, torch.Tensor]

    def write(self, folder: Path, kind: str) -> None:
        """Write what :meth:`read` returns; keys and values only where a checksum does not do."""
        plain = {name: value for name, value in vars(self).items() if name != "dense"}
        (folder / f"{kind}.json").write_text(json.dumps(plain) + "\n")
        if kind in CODED:
            save_file(self.dense, folder / f"{kind}.dense.safetensors")

    @classmethod
    def read(cls, folder: Path, kind: str) -> "Outcome":
        """Return what was written; without keys and values where a checksum does."""
        plain = json.loads((folder / f"{kind}.json").read_text())
        return cls(**plain, dense=load_file(folder / f"{kind}.dense.safetensors") if kind in CODED else {})

    def assert_like(self, expected: "Outcome", kind: str) -> None:
        """Check that this is what was expected."""
        assert (self.seen, self.digests.keys()) == (expected.seen, expected.digests.keys())
        if kind in CODED:
            for name, tensor in self.dense.items():
                torch.testing.assert_close(tensor, expected.dense[name], atol=1e-6, rtol=1e-6)
        else:
            assert self.digests == expected.digests
        assert self.tokens == expected.tokens


def outcome(model: Any, cache: PiKVCache, chunk: list[int]) -> Outcome:
    """Return what a cache holds, and go on with it."""
    held, seen = dense(cache), cache.get_seq_length()
    return Outcome(chunk, go_on(model, cache, chunk)[0], seen, digests(held), held)


def save_golden(folder: Path, kind: str, chunks: int = 30) -> None:
    """Save the cache of a kind and what is expected of it, after that chunk which leaves the least doubt."""
    model = model_of(kind)
    KINDS[kind](model, kind).save(cache_file(folder, kind))
    tried = [tokens_of(f"more {number}", tokens=5)[0].tolist() for number in range(chunks)]
    best = max(tried, key=lambda chunk: go_on(model, load(model, folder, kind), chunk)[1])
    outcome(model, load(model, folder, kind), best).write(folder, kind)


def version_of(file: Path) -> str:
    """Return the version that a saved cache says it is of."""
    content = file.read_bytes()
    return str(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["layout"])
