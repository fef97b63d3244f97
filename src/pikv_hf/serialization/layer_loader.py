"""Loading a layer from a file: everything is checked, then an empty layer of the model is filled."""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..layer.layer import PiKVLayer
from ..layer.layer_state import LayerState
from ..layer.mask_columns import trimmed
from .format import (
    LAYER_STATE,
    PAGED_LAYER,
    SLIDING_LAYER,
    layer_prefix,
    part_prefix,
    read_keys,
    shard_map_prefix,
)
from .part_loader import PartLoader, ShardMapLoader
from .saved_options import loaded_options
from .state_loader import StateLayerLoader
from .table_checks import are_distinct
from .table_reader import TableReader
from .tensor_file import Section, Spec, TensorFile, require


@dataclasses.dataclass(frozen=True, slots=True)
class SavedParts:
    """The parts of a layer when it was saved.

    Attributes
    ----------
    total : int
        How many there were.
    numbers : list of int
        Those in the file: all, or that of one process.
    devices : list of str
        Their devices as they were named, empty for that of the layer's attention.
    """

    total: int
    numbers: list[int]
    devices: list[str]

    @classmethod
    def of(cls, description: dict[str, Any]) -> "SavedParts":
        """Return what the description of a layer says."""
        parts = description["parts"]
        saved = cls(description["num_parts"], [part["number"] for part in parts], [part["device"] for part in parts])
        total, numbers = saved.total, saved.numbers
        known = numbers == list(range(total)) or (len(numbers) == 1 and 0 <= numbers[0] < total)
        require(total > 0 and known, f"{saved}, which makes no sense")
        return saved

    def __str__(self) -> str:
        if len(self.numbers) < self.total:
            return f"part {self.numbers[0]} of {self.total}"
        return f"{self.total} parts" if self.total > 1 else "one part"


class PagedLayerLoader:
    """Loads a paged layer: checks what the file says, then restores it.

    Parameters
    ----------
    index : int
        The model layer.
    description : dict
        What :func:`~pikv_hf.serialization.layer_writer.describe_layer` made.
    file : TensorFile
        Its tensors.
    overrides : dict
        Options of :class:`~pikv_hf.PiKVConfig` in place of what was saved.

    Attributes
    ----------
    parts : SavedParts
        Where its parts were.
    """

    def __init__(self, index: int, description: dict[str, Any], file: TensorFile, overrides: dict[str, Any]) -> None:
        layer = read_keys(PAGED_LAYER, description, "it")
        self.config = loaded_options(layer["config"], overrides)
        self.parts = SavedParts.of(layer)
        self._state = read_keys(LAYER_STATE, layer["state"], "its state")
        self._has_expert_router: bool = layer["has_expert_router"]
        loads = self._state["expert_loads"]
        self._expert_loads = None if loads is None else np.array(loads, dtype=np.int64)
        self._loaders = [
            PartLoader(
                Section(file, part_prefix(index, part["number"])),
                part,
                overrides,
                self._state["seen"],
                self.parts.total,
            )
            for part in layer["parts"]
        ]
        self._shard_map: ShardMapLoader | None = None
        if layer["has_shard_map"]:
            section = Section(file, shard_map_prefix(index))
            self._shard_map = ShardMapLoader(section, self.config.num_shards, self.parts.total)

    @property
    def _tables(self) -> list[TableReader]:
        return [part.table for part in self._loaders if part.table is not None]

    # Checking

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer, with their dtypes and shapes."""
        specs = {} if self._shard_map is None else self._shard_map.specs()
        for part in self._loaders:
            specs |= part.specs()
        return specs

    def check(self) -> None:
        """Raise unless rows, pages and counts fit one another, in each part and together. The specs have been checked.

        A token is in one part only, but for those of the window, which are in all.
        """
        state, tables, total = self._state, self._tables, self.parts.total
        require(all(state[name] >= 0 for name in ("seen", "dropped", "assigned")), f"negative lengths in {state}")
        require(len(tables) in (0, len(self._loaders)), f"{len(tables)} of {len(self._loaders)} parts have a table")
        is_divided = bool(tables) and total > 1
        require(is_divided == (self._shard_map is not None), f"shards of {total} parts, with {len(tables)} tables")
        loads = self._expert_loads
        require(loads is None or (loads.ndim == 1 and bool((loads >= 0).all())), f"loads of experts are {loads}")
        if self._shard_map is not None:
            self._shard_map.check()
        for part in self._loaders:
            part.check(self._loaders[0])
        if tables:
            self._check_tables(tables)

    def _check_tables(self, tables: list[TableReader]) -> None:
        batch, padding = tables[0].batch, self._state["padding"]
        require(padding is None or len(padding) == batch, f"{batch} rows, paddings {padding}")
        for known in [] if padding is None else padding:
            columns = [known - 1] if isinstance(known, int) else known
            require(all(-1 <= each < self._state["seen"] for each in columns), f"padding {known} of a row")
        sizes = {self.config.page_size, *(table.config.page_size for table in tables)}
        require(len(sizes) == 1, f"pages of {sorted(sizes)} tokens")
        for positions in zip(tables[0].positions(True), *(table.positions(False) for table in tables), strict=True):
            require(are_distinct(positions), "a row has a position in two parts")

    def check_fits(self, layer: PiKVLayer) -> None:
        """Raise unless the model's layer is of this kind, and in as many parts."""
        require(isinstance(layer, PiKVLayer), f"it was saved as a paged layer, and is a {type(layer).__name__} here")
        there, here = self._has_expert_router, layer.has_expert_router
        require(there == here, f"a router was known: {there} there, {here} here")
        if self._expert_loads is not None:
            router = None if layer.attachment is None else layer.attachment.expert_routers.get(layer.layer_idx)
            experts, loads = 0 if router is None else router.num_experts, len(self._expert_loads)
            require(experts == loads, f"it has loads of {loads} experts, the router chooses among {experts}")
        parts, numbers = layer.layout.parts, [part.location.number for part in layer.parts]
        fits = (parts, numbers) == (self.parts.total, self.parts.numbers)
        require(fits, f"it was saved in {self.parts} and has the parts {numbers} of {parts} here")
        for table, part in zip(self._tables, layer.parts, strict=False):
            latent = part.latent and table.heads == 1
            may_have = latent or not table.rotary_values
            require(may_have, "bounds of keys have rotary parts, which those of this model's attention have not")

    # Restoring

    def restore(self, layer: PiKVLayer, device: torch.device) -> None:
        """Fill an empty layer whose attention is on `device`."""
        layer.store.config = self.config
        layer.store.state = self._restored_state()
        if self._shard_map is not None:
            layer.store.shard_map = self._shard_map.build(self.config, layer.layout.weights)
        if self._tables:
            store, table = layer.store, self._tables[0]
            store.heads, store.dtype, store.device = table.heads, table.dtype, device
        for loader, part in zip(self._loaders, layer.parts, strict=True):
            loader.restore(layer, part, device if part.location.device is None else part.location.device)
        layer.store.state.padding = self._restored_padding(layer)

    def _restored_padding(self, layer: PiKVLayer) -> np.ndarray | None:
        """Return which columns are padding; where a file only counts them, the first that hold no token."""
        saved = self._state["padding"]
        if saved is None or self._state["seen"] == 0:
            return None
        if any(isinstance(known, int) for known in saved):
            empty = ~layer.stored_mask().any(dim=1).cpu().numpy()
            saved = [np.flatnonzero(row)[:known] for row, known in zip(empty, saved, strict=True)]
        padding = np.zeros((len(saved), self._state["seen"]), dtype=np.bool_)
        for row, columns in zip(padding, saved, strict=True):
            row[columns] = True
        return trimmed(padding)

    def _restored_state(self) -> LayerState:
        saved = self._state
        return LayerState(
            seen=saved["seen"],
            dropped=saved["dropped"],
            assigned=saved["assigned"],
            evicted=saved["evicted"],
            is_initialized=saved["is_initialized"],
            expert_loads=None if self._expert_loads is None else self._expert_loads.copy(),
            reference_out=saved["reference_out"],
            history_out=saved["history_out"],
            reference_lost=saved["reference_lost"],
        )


class SlidingLayerLoader:
    """Loads a bounded sliding layer: checks what the file says, then restores it.

    Parameters
    ----------
    index : int
        The model layer.
    description : dict
        What :func:`~pikv_hf.serialization.layer_writer.describe_layer` made.
    file : TensorFile
        Its tensors.
    """

    def __init__(self, index: int, description: dict[str, Any], file: TensorFile) -> None:
        layer = read_keys(SLIDING_LAYER, description, "it")
        self.window, self.seen, self.stored = layer["window"], layer["seen"], layer["stored"]
        self._section = Section(file, layer_prefix(index))

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer."""
        names = ("keys", "values") if self.stored else ()
        return {self._section.name(name): self._section.spec(name) for name in names}

    def check(self) -> None:
        """Raise unless the tensors fit one another and the counters."""
        shapes = [spec.shape for spec in self.specs().values()]
        if shapes:
            require(len(shapes[0]) == 4 and shapes[0][:3] == shapes[1][:3], f"K/V have the shapes {shapes}")
            tokens, most = shapes[0][2], min(self.seen, max(0, self.window - 1))
            require(tokens <= most, f"{tokens} tokens are stored of {self.seen}, in a window of {self.window}")

    def check_fits(self, layer: Any) -> None:
        """Raise unless the model's layer is of this kind."""
        window = getattr(layer, "sliding_window", None)
        require(window == self.window, f"it was saved with a sliding window of {self.window}, the model's is {window}")

    def restore(self, layer: DynamicSlidingWindowLayer, device: torch.device) -> None:
        """Fill an empty layer."""
        if self.stored:
            # Copies, since what the file has is mapped into memory.
            keys, values = (self._section[name].to(device, copy=True) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        layer.cumulative_length = self.seen


LayerLoader = PagedLayerLoader | SlidingLayerLoader | StateLayerLoader


def layer_loader(index: int, description: Any, file: TensorFile, overrides: dict[str, Any]) -> LayerLoader:
    """Return the loader of layer `index`, by the kind that its description says; see :class:`PagedLayerLoader`."""
    kind = description["kind"]
    require(kind in ("paged", "sliding", "state"), f"it is of the kind {kind!r}")
    if kind != "paged":
        return (SlidingLayerLoader if kind == "sliding" else StateLayerLoader)(index, description, file)
    return PagedLayerLoader(index, description, file, overrides)
