"""The parts of a layer in a file, and which of them has which shard. See :mod:`pikv_hf.serialization.layer_writer`."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..config import PiKVConfig
from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..sharding.shard_map import ShardMap
from .table_loader import SavedTable, require
from .table_writer import SCHEDULE
from .tensor_file import CacheFileError, Spec, TensorFile


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Where the parts of a layer were when it was saved.

    Attributes
    ----------
    parts : int
        How many there are in all.
    numbers : list of int
        Those in the file.
    devices : list of str
        Their devices as they were named, empty for that of the layer's attention.
    shards : bool
        Whether the file says which part has which shard.
    others : list of dict
        Descriptions of the parts in the file but the first.
    """

    parts: int = 1
    numbers: list[int] = dataclasses.field(default_factory=lambda: [0])
    devices: list[str] = dataclasses.field(default_factory=lambda: [""])
    shards: bool = False
    others: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, description: dict[str, Any] | None) -> "Spread":
        """Return what a description says; a layer in one place has none."""
        if description is None:
            return cls()
        spread = cls(**description)
        parts, numbers = spread.parts, spread.numbers
        known = numbers == list(range(parts)) or (len(numbers) == 1 and 0 <= numbers[0] < parts)
        require(parts > 1 and known and len(spread.devices) == len(numbers), f"{spread}, which makes no sense")
        return spread

    def __str__(self) -> str:
        if len(self.numbers) < self.parts:
            return f"part {self.numbers[0]} of {self.parts}"
        return f"{self.parts} parts" if self.parts > 1 else "one part"


class SavedPart:
    """One part of a paged layer in a file: its table, and what its schedule knows.

    Parameters
    ----------
    number : int
        Of the part.
    prefix : str
        What the names of its tensors begin with.
    description : dict
        What :func:`~pikv_hf.serialization.table_writer.describe_part` made.
    file : TensorFile
        Its tensors.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.
    seen : int
        Columns of the layer.
    parts : int
        How many parts the layer has.
    """

    def __init__(
        self,
        number: int,
        prefix: str,
        description: dict[str, Any],
        file: TensorFile,
        overrides: dict[str, Any],
        seen: int,
        parts: int,
    ) -> None:
        self._number, self._prefix, self._file, self._parts = number, prefix, file, parts
        self._schedule: dict[str, Any] | None = description["schedule"]
        table = description["table"]
        self.table = None if table is None else SavedTable(prefix, table, file, overrides, seen, parts == 1)

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the part, with their dtypes and shapes."""
        specs: dict[str, Spec] = {}
        if self._schedule is not None and self._schedule["queries"]:
            name = f"{self._prefix}.schedule.queries"
            specs[name] = self._file.specs[name]
            require(specs[name].dtype.is_floating_point and len(specs[name].shape) == 4, f"{name} is {specs[name]}")
        return specs if self.table is None else specs | self.table.specs()

    def check(self, first: "SavedPart") -> None:
        """Raise unless what it stores makes sense, by itself and beside the first part. The specs have been checked."""
        if self.table is None:
            return
        with self._named():
            self.table.check()
            if self is not first:
                assert first.table is not None
                self.table.check_beside(first.table)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the part in errors, where there are several."""
        try:
            yield
        except CacheFileError as error:
            raise CacheFileError(f"part {self._number}: {error}" if self._parts > 1 else str(error)) from None

    def restore(self, layer: PiKVLayer, part: LayerPart, device: torch.device) -> None:
        """Fill an empty part, on `device`, of a layer that knows its options and its shards."""
        self._restore_schedule(part, device)
        if self.table is not None:
            part.table = self.table.build(layer, part, device)

    def _restore_schedule(self, part: LayerPart, device: torch.device) -> None:
        """Let the part's schedule, if its options ask for one now, know what the saved one knew."""
        if part.scheduler is None or self._schedule is None:
            return
        for name in SCHEDULE:
            setattr(part.scheduler, name, self._schedule["state"][name])
        kind, options = self._schedule["policy"]
        if type(part.scheduler.policy).__name__ == kind:
            part.scheduler.policy = dataclasses.replace(part.scheduler.policy, **options)  # type: ignore[type-var]
        if self._schedule["queries"] and part.scheduler.policy.reads_bounds:
            part.scheduler.queries = self._file[f"{self._prefix}.schedule.queries"].to(device, copy=True)


class SavedShards:
    """Which part of a layer has which shard, in a file.

    Parameters
    ----------
    prefix : str
        What the names of its tensors begin with.
    file : TensorFile
        Its tensors.
    num_shards, parts : int
        S and G.
    """

    def __init__(self, prefix: str, file: TensorFile, num_shards: int, parts: int) -> None:
        self._prefix, self._file = prefix, file
        self._shapes = {
            "fractions": Spec(torch.float64, (num_shards, parts)),
            "loads": Spec(torch.int64, (num_shards,)),
            "placed": Spec(torch.float64, (parts,)),
            "recent": Spec(torch.float64, (num_shards,)),
        }

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for it."""
        return {f"{self._prefix}.{name}": spec for name, spec in self._shapes.items()}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: self._file[f"{self._prefix}.{name}"].numpy() for name in self._shapes}

    def check(self) -> None:
        """Raise unless every shard is divided wholly, and counts are numbers of tokens."""
        fractions, loads, placed, recent = self._arrays().values()
        divided = bool((fractions >= 0).all()) and np.allclose(fractions.sum(axis=1), 1, atol=1e-6)
        require(divided, f"the shares of the parts in the shards add up to {fractions.sum(axis=1)}")
        counted = (loads >= 0).all() and np.isfinite(placed).all() and (np.isfinite(recent) & (recent >= 0)).all()
        require(bool(counted), f"tokens: {loads} and {recent} of shards, {placed} of parts")

    def build(self, config: PiKVConfig, weights: Sequence[float]) -> ShardMap:
        """Return the map, for parts that are to have these shares of the tokens from now on."""
        whole = config.budget_scope == "shard"
        shard_map = ShardMap(config.num_shards, list(weights), config.page_size, whole)
        shard_map.resume(**self._arrays())
        return shard_map
