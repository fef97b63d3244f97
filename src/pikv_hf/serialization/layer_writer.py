"""A layer of the cache as a file holds it: a description in plain values, and the tensors of its parts.

A layer on several devices has all of its parts in the file, one that several processes share only that of the process.
See :mod:`pikv_hf.serialization.table_writer` for what a part stores.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..layer.layer_state import LayerState
from ..layer.own_layer import has_positions, is_state_layer, tensors_of
from ..scheduling.page_scheduler import PageScheduler
from .format import (
    LAYER_STATE,
    PAGED_LAYER,
    PART,
    RECALL_TENSORS,
    SCHEDULER,
    SHARD_MAP_TENSORS,
    SLIDING_LAYER,
    STATE_LAYER,
    described,
    layer_prefix,
    logit_sinks_name,
    part_prefix,
    recall_name,
    scheduler_queries_name,
    shard_map_prefix,
)
from .table_writer import describe_table
from .tensor_writer import Group

Written = tuple[dict[str, Any], list[Group]]


def describe_layer(index: int, layer: Any) -> Written:
    """Return what is written of layer `index`, a :class:`PiKVLayer` or one of transformers' own.

    Raises
    ------
    ValueError
        If new tokens of the layer wait for a press, a router or their values.
    """
    if not isinstance(layer, PiKVLayer):
        return (_describe_sliding if type(layer) is DynamicSlidingWindowLayer else _describe_states)(index, layer)
    layer.edits.settle_unless_awaited()
    _require_settled(layer)
    groups = _shard_map_tensors(index, layer)
    parts = []
    for part in layer.parts:
        described_part, written = _describe_part(part_prefix(index, part.location.number), layer, part)
        parts.append(described_part)
        groups += written
    description = described(
        PAGED_LAYER,
        kind="paged",
        config=layer.config.to_dict(),
        has_expert_router=layer.has_expert_router,
        state=_describe_state(layer.state),
        num_parts=layer.layout.parts,
        has_shard_map=layer.store.shard_map is not None,
        parts=parts,
    )
    return description, groups


def _require_settled(layer: PiKVLayer) -> None:
    where = f"layer {layer.layer_idx}"
    if layer.edits.assignment.staged is not None:
        raise ValueError(f"{where}: keys were assigned without values; assign both before saving")
    if layer.pending is not None:
        layer.pending.check_indexed(layer.layer_idx)
        awaited = "a press" if layer.edits.awaits_press else "the layer's router"
        raise ValueError(
            f"{where}: {layer.pending.tokens} of {layer.seen} tokens wait for {awaited}; save the cache after the "
            "forward pass, and outside of the press's block"
        )


def _describe_state(state: LayerState) -> dict[str, Any]:
    return described(
        LAYER_STATE,
        seen=state.seen,
        dropped=state.dropped,
        assigned=state.assigned,
        evicted=state.evicted,
        is_initialized=state.is_initialized,
        padding=None if state.padding is None else [np.flatnonzero(row).tolist() for row in state.padding],
        expert_loads=None if state.expert_loads is None else state.expert_loads.tolist(),
        reference_out=state.reference_out,
        history_out=state.history_out,
        reference_lost=state.reference_lost,
    )


def _shard_map_tensors(index: int, layer: PiKVLayer) -> list[Group]:
    if layer.store.shard_map is None:
        return []
    tensors = {name: torch.from_numpy(array) for name, array in layer.store.shard_map.state().items()}
    assert tuple(tensors) == SHARD_MAP_TENSORS
    return [Group.of({f"{shard_map_prefix(index)}.{name}": tensor for name, tensor in tensors.items()})]


def _describe_part(prefix: str, layer: PiKVLayer, part: LayerPart) -> Written:
    scheduler, table = part.scheduler, None
    groups: list[Group] = []
    if part.table is not None:
        table, groups = describe_table(prefix, layer, part.table)
    if scheduler is not None:
        groups += _scheduler_tensors(prefix, scheduler)
    description = described(
        PART,
        number=part.location.number,
        device=part.location.name,
        scheduler=None if scheduler is None else _describe_scheduler(scheduler),
        table=table,
    )
    return description, groups


def _describe_scheduler(scheduler: PageScheduler) -> dict[str, Any]:
    policy: Any = scheduler.policy
    return described(
        SCHEDULER,
        policy=policy.name,
        options=dataclasses.asdict(policy),
        step=scheduler.now,
        pages_evicted=scheduler.pages_evicted,
        tokens_evicted=scheduler.tokens_evicted,
        has_queries=scheduler.queries is not None,
        softcap=scheduler.softcap,
        has_logit_sinks=scheduler.logit_sinks is not None,
        recall_columns=None if scheduler.recall is None else scheduler.recall.columns,
    )


def _scheduler_tensors(prefix: str, scheduler: PageScheduler) -> list[Group]:
    named = {scheduler_queries_name(prefix): scheduler.queries, logit_sinks_name(prefix): scheduler.logit_sinks}
    if (recall := scheduler.recall) is not None:
        named |= {recall_name(prefix, name): getattr(recall, name) for name in RECALL_TENSORS}
    return [Group.of({name: tensor}) for name, tensor in named.items() if tensor is not None]


def _describe_sliding(index: int, layer: Any) -> Written:
    stored = bool(layer.is_initialized) and layer.keys.ndim == 4
    description = described(
        SLIDING_LAYER, kind="sliding", window=layer.sliding_window, seen=layer.get_seq_length(), stored=stored
    )
    tensors = {"keys": layer.keys, "values": layer.values} if stored else {}
    return description, [Group.of({f"{layer_prefix(index)}.{name}": tensor}) for name, tensor in tensors.items()]


def _describe_states(index: int, layer: Any) -> Written:
    tensors = tensors_of(layer)
    description = described(
        STATE_LAYER,
        kind="state",
        **{"class": type(layer).__name__},
        seen=layer.get_seq_length() if has_positions(layer) else 0,
        tensors=list(tensors),
        conv_kernel_sizes=list(layer.conv_kernel_size.values()) if is_state_layer(layer) else [],
        has_previous_state=list(layer.has_previous_state.values()) if is_state_layer(layer) else [],
    )
    return description, [Group.of({f"{layer_prefix(index)}.{name}": tensor}) for name, tensor in tensors.items()]
