"""The keys and the names of tensors in a saved cache, kind by kind: renaming something in the code changes none.

A change of what is written here is a new version of the format: see "A new version" in docs/file_format.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_caches import KINDS, cache_file, model_of, version_of
from safetensors import safe_open

METADATA = {"format", "layout", "pikv_hf", "config", "model", "layers", "checksums", "header_checksum"}
MODEL = {"config", "dtypes", "weights", "constants", "adapters", "transformers"}
LAYER = {
    *("kind", "config", "has_expert_router", "state", "num_parts", "has_shard_map", "parts"),
    *("state.seen", "state.dropped", "state.assigned", "state.evicted", "state.is_initialized"),
    *("state.padding", "state.expert_loads", "state.reference_out", "state.history_out", "state.reference_lost"),
    *("parts.number", "parts.device", "parts.scheduler", "parts.table"),
    *("parts.table.heads", "parts.table.page_heads", "parts.table.key_dim", "parts.table.value_dim"),
    *("parts.table.dtype", "parts.table.config", "parts.table.num_shards", "parts.table.recent_window"),
    *("parts.table.sink_pages", "parts.table.codecs", "parts.table.encoders", "parts.table.pools"),
    *("parts.table.has_queries", "parts.table.query_scale"),
    *("parts.table.pools.name", "parts.table.pools.key_codec", "parts.table.pools.value_codec"),
    *("parts.table.pools.pages", "parts.table.pools.capacity", "parts.table.pools.has_bounds"),
    "parts.table.pools.usage_step",
}
CODECS = {f"parts.table.codecs.{key}" for key in ("name", "keys", "rank", "has_basis")}
SCHEDULER = {
    f"parts.scheduler.{key}"
    for key in (
        *("policy", "options", "step", "pages_evicted", "tokens_evicted", "has_queries"),
        *("softcap", "has_logit_sinks", "recall_columns"),
    )
}
PIKV = {
    f"parts.scheduler.options.{key}"
    for key in (
        *("mass_weight", "recency_weight", "reuse_weight", "half_life"),
        *("threshold", "target_hit_rate", "rate", "bound_weight"),
    )
}
SLIDING = {"kind", "window", "seen", "stored"}


def encoders(keys: str, values: str) -> set[str]:
    path = "parts.table.encoders"
    return {f"{path}.keys", f"{path}.values", f"{path}.keys.{keys}", f"{path}.values.{values}"}


#: By kind: the keys of its layers beside those of every paged layer.
KEYS: dict[str, set[str]] = {
    "plain": set(),
    "padded": set(),
    "int4": CODECS | encoders("int4", "int4"),
    "lowrank": CODECS | encoders("lowrank", "lowrank+int4"),
    "budget": SCHEDULER,
    "joint": SCHEDULER | PIKV,
    "tiers": CODECS | encoders("none", "none") | SCHEDULER | PIKV,
    "routing": set(),
    "code_bounds": CODECS | encoders("int4", "int4") | SCHEDULER,
    "sliding": CODECS | encoders("int8", "fp8") | SLIDING,
    "assigned": CODECS,
    "config_alone": set(),
    "lanes": CODECS | encoders("int2", "int8"),
    "parts": SCHEDULER | {"parts.scheduler.options.per_step"},
}

TABLE = {"rows", "open_pages", "page_counts", "page_numbers"}
PLAIN = {f"pages.plain.{name}" for name in ("keys", "values", "positions", "experts", "count", "shard", "numbers")}
PLAIN |= {"pages.plain.incompressible"}
USAGE, BOUNDS = {"usage.shares", "usage.steps"}, {"bounds.ends", "bounds.known"}
INTEGER_KEYS = {f"keys.{name}" for name in ("codes", "spread", "floor", "outliers", "fine")}
INTEGER_VALUES = {f"values.{name}" for name in ("codes", "spread", "floor")}


def packed(pool: str, codes: set[str]) -> set[str]:
    notes = {"positions", "count", "shard", "errors", "numbers"}
    return {f"pages.{pool}.{name}" for name in notes | codes}


def beside(pool: str, names: set[str]) -> set[str]:
    return {f"pages.{pool}.{name}" for name in names}


#: By kind: the tensors of each part of a layer beside those of every part.
TENSORS: dict[str, set[str]] = {
    "plain": set(),
    "padded": set(),
    "int4": packed("int4", INTEGER_KEYS | INTEGER_VALUES) | {"queries"},
    "lowrank": {
        *packed("lowrank/lowrank+int4", {"keys.codes", "values.latent"} | INTEGER_VALUES),
        *("queries", "codecs.0.basis", "codecs.1.basis"),
    },
    "budget": beside("plain", USAGE | BOUNDS) | {"scheduler.queries"},
    "joint": {
        *beside("plain", USAGE),
        "scheduler.queries",
        *(f"scheduler.recall.{name}" for name in ("known", "masses", "first")),
    },
    "tiers": packed("none", {"keys.codes", "values.codes"} | USAGE) | beside("plain", USAGE) | {"queries"},
    "routing": beside("plain", BOUNDS),
    # What the codes of keys say is not said again.
    "code_bounds": {
        *packed("int4", INTEGER_KEYS | INTEGER_VALUES | USAGE),
        *beside("plain", BOUNDS | USAGE),
        "queries",
    },
    "sliding": packed("int8/fp8", INTEGER_KEYS | {"values.codes", "values.spread"}) | {"queries"},
    "assigned": packed("none", {"keys.codes", "values.codes"}),
    "config_alone": set(),
    "lanes": {
        *packed("int2/int8", INTEGER_KEYS | INTEGER_VALUES),
        *packed("none", {"keys.codes", "values.codes"}),
    },
    "parts": beside("plain", USAGE),
}
SHARD_MAP = {f"layers.0.shard_map.{name}" for name in ("fractions", "loads", "placed", "recent")}
#: By kind, where it is another than the first part of layer 0 alone: parts, and the tensors that are of no part.
PARTS = {"parts": ["layers.0.parts.0", "layers.0.parts.1"], "sliding": ["layers.1.parts.0"]}
OTHERS = {"parts": SHARD_MAP, "sliding": {"layers.0.keys", "layers.0.values"}}


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Yield the keys of nested descriptions; those of :class:`PiKVConfig` are public, and not followed."""
    for each in value if isinstance(value, list) else [value]:
        for key, inner in each.items() if isinstance(each, dict) else ():
            yield f"{path}{key}"
            if key != "config":
                yield from keys_of(inner, f"{path}{key}.")


@pytest.mark.parametrize("kind", KEYS)
def test_a_file_has_these_keys_and_tensors(kind: str, tmp_path: Path) -> None:
    path = cache_file(tmp_path, kind)
    model = model_of(kind)
    KINDS[kind](model, kind).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), set(file.keys())
    assert version_of(path) == "5"
    assert metadata.keys() == METADATA
    assert json.loads(metadata["model"]).keys() == MODEL
    assert set(keys_of(json.loads(metadata["layers"]))) == LAYER | KEYS[kind]
    of_parts = {
        f"{part}.{name}" for part in PARTS.get(kind, ["layers.0.parts.0"]) for name in TABLE | PLAIN | TENSORS[kind]
    }
    assert tensors == of_parts | OTHERS.get(kind, set())


def test_all_kinds_are_here() -> None:
    # What processes save has the keys of their parts.
    assert set(KINDS) - {"processes"} == set(KEYS) == set(TENSORS)
