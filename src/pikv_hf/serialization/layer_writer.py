"""A layer of the cache as a file holds it: a description in plain values, and the tensors of its parts.

A layer in one place is written as its only part. One on several devices has all of its parts in the file, one that
several processes share only that of the process. See :mod:`pikv_hf.serialization.table_writer` for a part.
"""

from typing import Any

import torch

from ..layer.layer import PiKVLayer
from .table_writer import describe_part
from .tensor_file import Group

#: What files call plain fields of :class:`~pikv_hf.layer.layer_state.LayerState`, those that are but a name with an
#: underscore before it.
STATE = (
    "seen",
    "dropped",
    "_assigned",
    "evicted",
    "vetted",
    "is_initialized",
    "_reference_out",
    "_history_out",
    "_reference_lost",
)


def describe_layer(index: int, layer: Any) -> tuple[dict[str, Any], list[Group]]:
    """Return what is written of layer `index`, a :class:`PiKVLayer` or a bounded sliding layer.

    Raises
    ------
    ValueError
        If new tokens of the layer wait for a press, a router or their values.
    """
    if not isinstance(layer, PiKVLayer):
        return _describe_sliding(index, layer)
    layer.settle_unless_awaited()
    _require_settled(layer)
    parts, groups = [], []
    for part in layer.parts:
        described, written = describe_part(part_prefix(index, part.location.number), layer, part)
        parts.append(described)
        groups += written
    description: dict[str, Any] = {
        "kind": "paged",
        "state": {name: getattr(layer.state, name.removeprefix("_")) for name in STATE},
        "padding": None if layer.state.padding is None else layer.state.padding.tolist(),
        "config": layer.config.to_dict(),
        "routed": layer.has_expert_router,
        **parts[0],
    }
    if layer.state.expert_loads is not None:
        description["expert_loads"] = layer.state.expert_loads.tolist()
    if layer.layout.parts > 1:
        description["spread"] = {
            "parts": layer.layout.parts,
            "numbers": [part.location.number for part in layer.parts],
            "devices": [part.location.name for part in layer.parts],
            "shards": layer.store.shard_map is not None,
            "others": parts[1:],
        }
        groups += _describe_shards(index, layer)
    return description, groups


def part_prefix(index: int, number: int) -> str:
    """Return what the names of the tensors of a layer's part begin with."""
    return f"layers.{index}.parts.{number}" if number else f"layers.{index}"


def shards_prefix(index: int) -> str:
    """Return what the names of the tensors begin with that say which part has which shard."""
    return f"layers.{index}.shards"


def _describe_shards(index: int, layer: PiKVLayer) -> list[Group]:
    if layer.store.shard_map is None:
        return []
    tensors = {name: torch.from_numpy(array) for name, array in layer.store.shard_map.state().items()}
    return [Group.of({f"{shards_prefix(index)}.{name}": tensor for name, tensor in tensors.items()})]


def _require_settled(layer: PiKVLayer) -> None:
    where = f"layer {layer.layer_idx}"
    if layer.assignment.staged is not None:
        raise ValueError(f"{where}: keys were assigned without values; assign both before saving")
    if layer.pending is not None:
        awaited = "a press" if layer.awaits_press else "the layer's router"
        raise ValueError(
            f"{where}: {layer.pending.tokens} of {layer.seen} tokens wait for {awaited}; save the cache after the "
            "forward pass, and outside of the press's block"
        )


def _describe_sliding(index: int, layer: Any) -> tuple[dict[str, Any], list[Group]]:
    held = bool(layer.is_initialized) and layer.keys.ndim == 4
    description = {
        "kind": "sliding",
        "window": layer.sliding_window,
        "seen": layer.get_seq_length(),
        "held": held,
    }
    parts = {f"layers.{index}.keys": layer.keys, f"layers.{index}.values": layer.values} if held else {}
    return description, [Group.of({name: tensor}) for name, tensor in parts.items()]
