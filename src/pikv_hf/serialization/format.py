"""All keys and names of tensors in a saved cache, so that no name in the code is the name of anything in a file.

docs/file_format.md says what each key means. Files of older versions are brought to these keys by
:mod:`pikv_hf.serialization.older_versions` when they are read.
"""

from typing import Any

from .tensor_file import CacheFileError

#: `format` in the metadata of every saved cache.
FORMAT = "pikv-cache"

#: `layout` in the metadata: the version of the keys below, which changes whenever any of them does.
VERSION = "5"

#: The versions that are read. 1 and 2 have names of their own, 2 is 1 for layers in several parts; 3 counted padding,
#: and knew neither adapters nor caches made from a config alone; 4 did not know how well tokens would be recalled.
READ_VERSIONS = ("1", "2", "3", "4", "5")

#: The fingerprint of the model. All but the config and transformers are null for a cache made from a config alone.
MODEL = ("config", "dtypes", "weights", "constants", "adapters", "transformers")

#: An adapter in use.
ADAPTER = ("name", "merged", "scaling", "modules", "digest")

#: A layer with a bounded sliding window, as transformers keeps it.
SLIDING_LAYER = ("kind", "window", "seen", "stored")

#: A layer of transformers' own, and its class: with convolution or recurrent states, beside K/V or not, or nothing.
STATE_LAYER = ("kind", "class", "seen", "tensors", "conv_kernel_sizes", "has_previous_state")

#: A paged layer.
PAGED_LAYER = ("kind", "config", "has_expert_router", "state", "num_parts", "has_shard_map", "parts")

#: What a paged layer knows of its tokens.
LAYER_STATE = (
    "seen",
    "dropped",
    "assigned",
    "evicted",
    "is_initialized",
    "padding",
    "expert_loads",
    "reference_out",
    "history_out",
    "reference_lost",
)

#: One part of a paged layer: of one device, or one process.
PART = ("number", "device", "scheduler", "table")

#: What a part's scheduler knows; `policy` is its registered name.
SCHEDULER = (
    "policy",
    "options",
    "step",
    "pages_evicted",
    "tokens_evicted",
    "has_queries",
    "softcap",
    "has_logit_sinks",
    "recall_columns",
)

#: What a part stores.
TABLE = (
    "heads",
    "page_heads",
    "key_dim",
    "value_dim",
    "dtype",
    "config",
    "num_shards",
    "recent_window",
    "sink_pages",
    "codecs",
    "encoders",
    "pools",
    "has_queries",
    "query_scale",
)

#: A codec, of which pools and encoders have the number.
CODEC = ("name", "keys", "rank", "has_basis")

#: By which codecs the next pages are encoded, by name of the codec.
ENCODERS = ("keys", "values")

#: The pages of a pool. Only the plain one has no codecs.
POOL = ("name", "key_codec", "value_codec", "pages", "capacity", "has_bounds", "usage_step")

#: Tensors of a table: its rows, the pages of each sequence, and the queries by which errors are judged.
TABLE_TENSORS = ("rows", "open_pages", "page_counts", "page_numbers", "queries")

#: Tensors of what a scheduler knows of how well tokens would be recalled.
RECALL_TENSORS = ("known", "masses", "first")

#: Tensors of a shard map.
SHARD_MAP_TENSORS = ("fractions", "loads", "placed", "recent")


def described(keys: tuple[str, ...], /, **values: Any) -> dict[str, Any]:
    """Return a description with exactly these keys."""
    assert tuple(values) == keys, f"{tuple(values)} is to be written as {keys}"
    return values


def read_keys(keys: tuple[str, ...], description: Any, what: str) -> dict[str, Any]:
    """Return a description out of a file.

    Raises
    ------
    CacheFileError
        Unless it has exactly these keys.
    """
    missing, unknown = sorted(set(keys) - set(description)), sorted(set(description) - set(keys))
    if missing or unknown:
        raise CacheFileError(f"{what} lacks the keys {missing} and has the unknown keys {unknown}")
    return {key: description[key] for key in keys}


# The names of tensors


def layer_prefix(layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"layers.{layer}"


def part_prefix(layer: int, part: int) -> str:
    """Return what the names of the tensors of a layer's part begin with."""
    return f"{layer_prefix(layer)}.parts.{part}"


def shard_map_prefix(layer: int) -> str:
    """Return what the names of the tensors begin with that say which part has which shard."""
    return f"{layer_prefix(layer)}.shard_map"


def pool_prefix(part: str, pool: str) -> str:
    """Return what the names of the tensors of pool `"plain"`, `"int4"`, `"int4/int2"` begin with."""
    return f"{part}.pages.{pool}"


def basis_name(part: str, codec: int) -> str:
    """Return the name of a codec's basis."""
    return f"{part}.codecs.{codec}.basis"


def scheduler_queries_name(part: str) -> str:
    """Return the name of the queries that a scheduling policy looks at."""
    return f"{part}.scheduler.queries"


def logit_sinks_name(part: str) -> str:
    """Return the name of the logits of attention sinks beside a scheduler's queries."""
    return f"{part}.scheduler.logit_sinks"


def recall_name(part: str, tensor: str) -> str:
    """Return the name of one of :data:`RECALL_TENSORS`."""
    return f"{part}.scheduler.recall.{tensor}"
