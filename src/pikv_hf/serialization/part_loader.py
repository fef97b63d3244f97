"""Loading the parts of a layer from a file, and which of them has which shard."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..allocation.known_recall import KnownRecall
from ..config import PiKVConfig
from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..scheduling.page_scheduler import PageScheduler
from ..scheduling.policies.registry import POLICIES
from ..sharding.shard_map import ShardMap
from .format import (
    PART,
    RECALL_TENSORS,
    SCHEDULER,
    SHARD_MAP_TENSORS,
    logit_sinks_name,
    read_keys,
    recall_name,
    scheduler_queries_name,
)
from .table_checks import check_beside, check_table
from .table_loader import build_table
from .table_reader import TableReader
from .tensor_file import CacheFileError, Section, Spec, require


class PartLoader:
    """Loads one part of a paged layer: checks, then restores, its table and its scheduler's state.

    Parameters
    ----------
    section : Section
        Its tensors.
    description : dict
        See :data:`~pikv_hf.serialization.format.PART`.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.
    seen : int
        Columns of the layer.
    parts : int
        How many parts the layer has.
    """

    def __init__(self, section: Section, description: Any, overrides: dict[str, Any], seen: int, parts: int) -> None:
        part = read_keys(PART, description, "a part")
        self._section, self._number, self._parts = section, part["number"], parts
        scheduler, table = part["scheduler"], part["table"]
        self._scheduler = None if scheduler is None else read_keys(SCHEDULER, scheduler, "its scheduler")
        self._keeps_scheduler = "scheduler" not in overrides
        self.table = None if table is None else TableReader(section, table, overrides, seen, parts == 1)

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the part, with their dtypes and shapes."""
        specs: dict[str, Spec] = {}
        for name, dimensions in self._scheduler_tensors().items():
            specs[name] = spec = self._section.file.specs[name]
            require(spec.dtype.is_floating_point and len(spec.shape) == dimensions, f"{name} is {spec}")
        if self._scheduler is not None and (columns := self._scheduler["recall_columns"]) is not None:
            known = recall_name(self._section.prefix, "known")
            of_first = self._section.file.specs[recall_name(self._section.prefix, "first")].shape
            require(isinstance(columns, int) and columns > 0, f"{known} is of {columns!r} columns")
            specs[known] = Spec(torch.uint8, (*of_first[:2], -(-columns // 8)))
        return specs if self.table is None else specs | self.table.specs()

    def _scheduler_tensors(self) -> dict[str, int]:
        """Return the floating point tensors of the scheduler, and their numbers of dimensions."""
        saved, prefix = self._scheduler, self._section.prefix
        found: dict[str, int] = {}
        if saved is not None and saved["has_queries"]:
            found[scheduler_queries_name(prefix)] = 4
        if saved is not None and saved["has_logit_sinks"]:
            found[logit_sinks_name(prefix)] = 1
        if saved is not None and saved["recall_columns"] is not None:
            found |= {recall_name(prefix, "first"): 4, recall_name(prefix, "masses"): 1}
        return found

    def check(self, first: "PartLoader") -> None:
        """Raise unless what it stores makes sense, by itself and beside the first part. The specs have been checked."""
        with self._part_in_errors():
            if self._scheduler is not None and self._keeps_scheduler:
                policy = self._scheduler["policy"]
                known = f"this release knows {', '.join(POLICIES)}; another can be chosen: load(..., scheduler=...)"
                require(policy in POLICIES, f"its pages were scheduled by the policy {policy!r}, and {known}")
            self._check_recall()
            if self.table is not None:
                check_table(self.table)
                if self is not first:
                    assert first.table is not None
                    check_beside(self.table, first.table)

    def _check_recall(self) -> None:
        """Raise unless as many tokens have a number as are said to be known."""
        if self._scheduler is None or self._scheduler["recall_columns"] is None:
            return
        known, masses, first = (self._section.file[recall_name(self._section.prefix, name)] for name in RECALL_TENSORS)
        heads = None if self.table is None else self.table.heads
        require(
            heads in (None, first.shape[1]), f"it is known of {first.shape[1]} heads what they would recall, of {heads}"
        )
        bits = int(np.unpackbits(known.numpy()).sum())
        require(
            bits == len(masses), f"it is said of {bits} tokens how well they would be recalled, of {len(masses)} it is"
        )

    @contextmanager
    def _part_in_errors(self) -> Iterator[None]:
        """Name the part in errors, where there are several."""
        try:
            yield
        except CacheFileError as error:
            raise CacheFileError(f"part {self._number}: {error}" if self._parts > 1 else str(error)) from None

    def restore(self, layer: PiKVLayer, part: LayerPart, device: torch.device) -> None:
        """Fill an empty part, on `device`, of a layer that knows its options and its shards."""
        if part.scheduler is not None and self._scheduler is not None:
            self._restore_scheduler(part.scheduler, self._scheduler, device)
        if self.table is not None:
            part.table = build_table(self.table, layer, part, device)

    def _restore_scheduler(self, scheduler: PageScheduler, saved: dict[str, Any], device: torch.device) -> None:
        """Restore a scheduler's counters, and the state of its policy if the options ask for the same one now."""
        scheduler.now = saved["step"]
        scheduler.pages_evicted, scheduler.tokens_evicted = saved["pages_evicted"], saved["tokens_evicted"]
        if scheduler.policy.name == saved["policy"]:
            scheduler.policy = dataclasses.replace(scheduler.policy, **saved["options"])  # type: ignore[type-var]
        if saved["has_queries"] and scheduler.remembers:
            queries = self._section.file[scheduler_queries_name(self._section.prefix)]
            scheduler.queries = queries.to(device, copy=True)
        if scheduler.jointly:
            self._restore_recall(scheduler, saved, device)

    def _restore_recall(self, scheduler: PageScheduler, saved: dict[str, Any], device: torch.device) -> None:
        """Restore what joint decisions go by beside the queries."""
        file, prefix = self._section.file, self._section.prefix
        scheduler.softcap = saved["softcap"]
        if saved["has_logit_sinks"]:
            scheduler.logit_sinks = file[logit_sinks_name(prefix)].to(device, copy=True)
        if saved["recall_columns"] is not None:
            tensors = {name: file[recall_name(prefix, name)].to(device, copy=True) for name in RECALL_TENSORS}
            scheduler.recall = KnownRecall(columns=saved["recall_columns"], **tensors)


class ShardMapLoader:
    """Loads which part of a layer has which shard: checks, then builds, the map.

    Parameters
    ----------
    section : Section
        Its tensors.
    num_shards, parts : int
        S and G.
    """

    def __init__(self, section: Section, num_shards: int, parts: int) -> None:
        self._section = section
        specs = (
            Spec(torch.float64, (num_shards, parts)),
            Spec(torch.int64, (num_shards,)),
            Spec(torch.float64, (parts,)),
            Spec(torch.float64, (num_shards,)),
        )
        self._specs = dict(zip(SHARD_MAP_TENSORS, specs, strict=True))

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for it."""
        return {self._section.name(name): spec for name, spec in self._specs.items()}

    def _arrays(self) -> list[np.ndarray]:
        return [self._section[name].numpy() for name in self._specs]

    def check(self) -> None:
        """Raise unless every shard is divided wholly, and counts are numbers of tokens."""
        fractions, loads, placed, recent = self._arrays()
        divided = bool((fractions >= 0).all()) and np.allclose(fractions.sum(axis=1), 1, atol=1e-6)
        require(divided, f"the shares of the parts in the shards add up to {fractions.sum(axis=1)}")
        counted = (loads >= 0).all() and np.isfinite(placed).all() and (np.isfinite(recent) & (recent >= 0)).all()
        require(bool(counted), f"tokens: {loads} and {recent} of shards, {placed} of parts")

    def build(self, config: PiKVConfig, weights: Sequence[float]) -> ShardMap:
        """Return the map, for parts that are to have these shares of the tokens from now on."""
        whole = config.budget_scope == "shard"
        shard_map = ShardMap(config.num_shards, list(weights), config.page_size, whole)
        shard_map.resume(*self._arrays())
        return shard_map
