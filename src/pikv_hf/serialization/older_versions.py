"""Translating what files of versions 1 to 4 say into the keys of today's version.

See :mod:`pikv_hf.serialization.format`. Versions 1 and 2 had the names that attributes of the code had at the time. The
first part of a layer was described together with the layer, and version 2 is version 1 with layers in several parts.
All of them but version 4 counted each row's padding, where today's says which columns it is, and said nothing of
adapters. None knew how well tokens would be recalled.
"""

from collections.abc import Iterable
from typing import Any

from .format import (
    LAYER_STATE,
    SHARD_MAP_TENSORS,
    basis_name,
    part_prefix,
    pool_prefix,
    scheduler_queries_name,
    shard_map_prefix,
)
from .tensor_file import CacheFileError

#: Versions that are translated.
OLDER = ("1", "2", "3", "4")

#: What a layer's state was called.
_STATE = {
    "seen": "seen",
    "dropped": "dropped",
    "_assigned": "assigned",
    "evicted": "evicted",
    "vetted": "vetted",
    "is_initialized": "is_initialized",
    "_reference_out": "reference_out",
    "_history_out": "history_out",
    "_reference_lost": "reference_lost",
}

#: Scheduling policies had the names of their classes.
_POLICIES = {
    "AdaKV": "ada_kv",
    "Duo": "duo",
    "H2O": "h2o",
    "LRU": "lru",
    "LRUPlus": "lru_plus",
    "PiKV": "pikv",
    "Quest": "quest",
    "ReuseDistance": "reuse_distance",
    "StreamingLLM": "streaming_llm",
    "TwoQueue": "two_queue",
}

#: Tensors of a table.
_TABLE_TENSORS = {
    "rows": "rows",
    "open": "open_pages",
    "lengths": "page_counts",
    "ids": "page_numbers",
    "queries": "queries",
}

#: Tensors of every pool, and those of the plain pool and of others.
_POOL_TENSORS = {
    "positions": "positions",
    "count": "count",
    "shard": "shard",
    "numbers": "numbers",
    "bounds.ends": "bounds.ends",
    "bounds.known": "bounds.known",
    "usage.shares": "usage.shares",
    "usage.steps": "usage.steps",
}
_PLAIN_TENSORS = {"tokens.0": "keys", "tokens.1": "values", "experts": "experts", "kept": "incompressible"}
# Experts were written without an entry for a token. Bounds in two parts repeat what the codes of the keys say.
_PACKED_TENSORS: dict[str, str | None] = {"errors": "errors", "experts": None}
_CODE_BOUNDS: dict[str, str | None] = {"bounds.ends": None, "bounds.spreads": None, "bounds.known": None}

#: Keys and values of a codec's pages were numbered: first what the keys have of this, in this order, then the values.
_INTEGERS = ("codes", "spread", "floor")
_CODES = {
    "none": ("codes",),
    "lowrank": ("codes",),
    "fp8": ("codes", "spread"),
    "int8": _INTEGERS,
    "int4": _INTEGERS,
    "int2": _INTEGERS,
    "lowrank+int4": _INTEGERS,
}
_KEYS_ALONE = ("outliers", "fine")

#: What schedulers of older versions did not know.
_NO_RECALL: dict[str, Any] = {"softcap": None, "has_logit_sinks": False, "recall_columns": None}


def upgraded_model(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a model in today's keys: what it does not say is null."""
    return {"constants": None, "adapters": None, **model}


def upgraded(
    version: str, layers: list[dict[str, Any]], tensors: Iterable[str]
) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    """Translate the descriptions of layers and the names of tensors into those of today's version.

    Parameters
    ----------
    version : str
        The older version.
    layers : list of dict
        What a file of it says.
    tensors : iterable of str
        The tensors that it has.

    Returns
    -------
    tuple
        Descriptions, and today's names by those in the file; None for a tensor that is not needed any more.
    """
    if version in ("3", "4"):
        return [_without_recall(_without_vetted(layer)) for layer in layers], {}
    stored = frozenset(tensors)
    described, names = [], {}
    for index, layer in enumerate(layers):
        if layer["kind"] == "sliding":
            described.append({"stored" if key == "held" else key: value for key, value in layer.items()})
            continue
        description, renamed = _Layer(index, layer, stored).upgraded()
        described.append(description)
        names.update(renamed)
    return described, names


def _without_vetted(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of version 3 as of today: whether all stored tokens were known to be real is not kept any more."""
    if "state" not in layer:
        return layer
    return {**layer, "state": {key: value for key, value in layer["state"].items() if key != "vetted"}}


def _without_recall(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of version 3 or 4 as of today: nothing is known of how well its tokens would be recalled."""
    parts = [
        part if part["scheduler"] is None else {**part, "scheduler": {**part["scheduler"], **_NO_RECALL}}
        for part in layer.get("parts", [])
    ]
    return {**layer, "parts": parts} if "parts" in layer else layer


class _Layer:
    """Translates the description and the tensors' names of one paged layer.

    Parameters
    ----------
    index : int
        The model layer.
    layer : dict
        Its description.
    stored : frozenset of str
        The tensors in the file.
    """

    def __init__(self, index: int, layer: dict[str, Any], stored: frozenset[str]) -> None:
        self._index, self._layer, self._stored = index, layer, stored
        self._names: dict[str, str | None] = {}

    def upgraded(self) -> tuple[dict[str, Any], dict[str, str | None]]:
        """Return the description, and the names of tensors."""
        layer = self._layer
        alone = {"parts": 1, "numbers": [0], "devices": [""], "shards": False, "others": []}
        spread = layer.get("spread", alone)
        state = {_STATE[key]: value for key, value in layer["state"].items()}
        state |= {"padding": layer["padding"], "expert_loads": layer.get("expert_loads")}
        if spread["shards"]:
            old, new = f"layers.{self._index}.shards", shard_map_prefix(self._index)
            self._rename(old, new, {name: name for name in SHARD_MAP_TENSORS})
        parts = zip(spread["numbers"], spread["devices"], [layer, *spread["others"]], strict=True)
        description = {
            "kind": layer["kind"],
            "config": layer["config"],
            "has_expert_router": layer["routed"],
            "state": {key: state[key] for key in LAYER_STATE},
            "num_parts": spread["parts"],
            "has_shard_map": spread["shards"],
            "parts": [self._part(*part) for part in parts],
        }
        return description, self._names

    def _rename(self, old: str, new: str, names: dict[str, str | None] | dict[str, str]) -> None:
        for before, after in names.items():
            self._names[f"{old}.{before}"] = None if after is None else f"{new}.{after}"

    def _part(self, number: int, device: str, part: dict[str, Any]) -> dict[str, Any]:
        old = f"layers.{self._index}.parts.{number}" if number else f"layers.{self._index}"
        new = part_prefix(self._index, number)
        self._names[f"{old}.schedule.queries"] = scheduler_queries_name(new)
        schedule, table = part["schedule"], part["table"]
        return {
            "number": number,
            "device": device,
            "scheduler": None if schedule is None else _scheduler(schedule),
            "table": None if table is None else self._table(old, new, table),
        }

    def _table(self, old: str, new: str, table: dict[str, Any]) -> dict[str, Any]:
        self._rename(old, new, _TABLE_TENSORS)
        for number in range(len(table["codecs"])):
            self._names[f"{old}.codecs.{number}.basis"] = basis_name(new, number)
        same = ("heads", "page_heads", "dtype", "config", "num_shards", "recent_window", "sink_pages", "query_scale")
        key_dim, value_dim = table["dims"]
        encoders = table["sealers"]
        return {
            **{key: table[key] for key in same},
            "key_dim": key_dim,
            "value_dim": value_dim,
            "codecs": [_codec(codec) for codec in table["codecs"]],
            "encoders": {"keys": encoders[0], "values": encoders[1]} if encoders else None,
            "pools": [self._pool(old, new, pool, table["codecs"]) for pool in table["pools"]],
            "has_queries": table["queries"],
        }

    def _pool(self, old: str, new: str, pool: dict[str, Any], codecs: list[dict[str, Any]]) -> dict[str, Any]:
        name = pool["name"] or "plain"
        old, new = f"{old}.pages.{name}", pool_prefix(new, name)
        names: dict[str, str | None] = {**_POOL_TENSORS, **(_PACKED_TENSORS if pool["name"] else _PLAIN_TENSORS)}
        keys, values = pool.get("codecs", (None, None))
        if pool["name"]:
            names |= _code_names(codecs[keys], codecs[values])
        has_code_bounds = f"{old}.bounds.spreads" in self._stored
        if has_code_bounds:
            names |= _CODE_BOUNDS
        self._rename(old, new, names)
        beside = pool["companions"]
        return {
            "name": name,
            "key_codec": keys,
            "value_codec": values,
            "pages": pool["pages"],
            "capacity": pool["capacity"],
            "has_bounds": "bounds" in beside and not has_code_bounds,
            "usage_step": beside["usage"]["now"] if "usage" in beside else None,
        }


def _scheduler(schedule: dict[str, Any]) -> dict[str, Any]:
    kind, options = schedule["policy"]
    state = schedule["state"]
    return {
        # Of a class that this release does not know, its own name: refused as an unknown policy.
        "policy": _POLICIES.get(kind, kind),
        "options": options,
        "step": state["now"],
        "pages_evicted": state["pages_evicted"],
        "tokens_evicted": state["tokens_evicted"],
        "has_queries": schedule["queries"],
        **_NO_RECALL,
    }


def _codec(codec: dict[str, Any]) -> dict[str, Any]:
    return {"has_basis" if key == "basis" else key: value for key, value in codec.items()}


def _code_names(key_codec: dict[str, Any], value_codec: dict[str, Any]) -> dict[str, str]:
    """Return the names of a pool's keys and values by the numbered ones."""
    parts = [
        f"{what}.{part}"
        for what, codec in (("keys", key_codec), ("values", value_codec))
        for part in _code_parts(codec)
    ]
    return {f"tokens.{number}": part for number, part in enumerate(parts)}


def _code_parts(codec: dict[str, Any]) -> list[str]:
    if codec["name"] not in _CODES:
        raise CacheFileError(f"it has pages of the unknown codec {codec['name']!r}")
    parts = list(_CODES[codec["name"]])
    if codec["keys"] and "floor" in parts:
        parts += _KEYS_ALONE
    return [*parts, "latent"] if codec["name"] == "lowrank+int4" else parts
