"""Checking what a file says of a layer, and building the layer from it."""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..config import PiKVConfig
from ..layer.layer import PiKVLayer
from ..layer.layer_state import LayerState
from .layer_writer import STATE, part_prefix, shards_prefix
from .part_loader import SavedPart, SavedShards, Spread
from .table_loader import SavedTable, are_distinct, require
from .tensor_file import Spec, TensorFile


class SavedSliding:
    """A bounded sliding layer in a file.

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
        self.window, self.seen, self.held = (description[name] for name in ("window", "seen", "held"))
        self.names = [f"layers.{index}.{part}" for part in ("keys", "values")] if self.held else []
        self._file = file

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer."""
        return {name: self._file.specs[name] for name in self.names}

    def check(self) -> None:
        """Raise unless the tensors fit one another and the counters."""
        shapes = [spec.shape for spec in self.specs().values()]
        if shapes:
            require(len(shapes[0]) == 4 and shapes[0][:3] == shapes[1][:3], f"K/V have the shapes {shapes}")
            held, most = shapes[0][2], min(self.seen, max(0, self.window - 1))
            require(held <= most, f"{held} tokens are held of {self.seen}, in a window of {self.window}")

    def check_fits(self, layer: Any) -> None:
        """Raise unless the model's layer is of this kind."""
        window = getattr(layer, "sliding_window", None)
        require(window == self.window, f"it was saved with a sliding window of {self.window}, the model's is {window}")

    def restore(self, layer: DynamicSlidingWindowLayer, device: torch.device) -> None:
        """Fill an empty layer."""
        if self.held:
            # Copies, since what the file has is mapped into memory.
            keys, values = (self._file[name].to(device, copy=True) for name in self.names)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        layer.cumulative_length = self.seen


class SavedPaged:
    """A paged layer in a file.

    Parameters
    ----------
    index : int
        The model layer.
    description : dict
        What :func:`~pikv_hf.serialization.layer_writer.describe_layer` made.
    file : TensorFile
        Its tensors.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.

    Attributes
    ----------
    spread : Spread
        Where its parts were.
    """

    def __init__(self, index: int, description: dict[str, Any], file: TensorFile, overrides: dict[str, Any]) -> None:
        self.config = PiKVConfig.from_dict({**description["config"], **overrides})
        self.state = {name: description["state"][name] for name in STATE}
        self.padding: list[int] | None = description["padding"]
        self.routed: bool = description["routed"]
        loads = description.get("expert_loads")
        self._expert_loads = None if loads is None else np.array(loads, dtype=np.int64)
        self.spread = Spread.of(description.get("spread"))
        described, parts = [description, *self.spread.others], self.spread.parts
        self._parts = [
            SavedPart(number, part_prefix(index, number), each, file, overrides, self.state["seen"], parts)
            for number, each in zip(self.spread.numbers, described, strict=True)
        ]
        self._shards: SavedShards | None = None
        if self.spread.shards:
            self._shards = SavedShards(shards_prefix(index), file, self.config.num_shards, parts)

    @property
    def _tables(self) -> list[SavedTable]:
        return [part.table for part in self._parts if part.table is not None]

    # Checking

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer, with their dtypes and shapes."""
        specs = {} if self._shards is None else self._shards.specs()
        for part in self._parts:
            specs |= part.specs()
        return specs

    def check(self) -> None:
        """Raise unless rows, pages and counts fit one another, in each part and together. The specs have been checked.

        A token is in one part only, but for those of the window, which are in all.
        """
        state, tables = self.state, self._tables
        require(all(state[name] >= 0 for name in ("seen", "dropped", "_assigned")), f"negative lengths in {state}")
        require(len(tables) in (0, len(self._parts)), f"{len(tables)} of {len(self._parts)} parts have a table")
        is_divided, parts = bool(tables) and self.spread.parts > 1, self.spread.parts
        require(is_divided == (self._shards is not None), f"shards of {parts} parts, with {len(tables)} tables")
        loads = self._expert_loads
        require(loads is None or (loads.ndim == 1 and bool((loads >= 0).all())), f"loads of experts are {loads}")
        if self._shards is not None:
            self._shards.check()
        for part in self._parts:
            part.check(self._parts[0])
        if tables:
            batch, sizes = tables[0].batch, {self.config.page_size, *(table.config.page_size for table in tables)}
            require(self.padding is None or len(self.padding) == batch, f"{batch} rows, paddings {self.padding}")
            require(len(sizes) == 1, f"pages of {sorted(sizes)} tokens")
            for held in zip(tables[0].positions(True), *(table.positions(False) for table in tables), strict=True):
                require(are_distinct(held), "a row has a position in two parts")

    def check_fits(self, layer: PiKVLayer) -> None:
        """Raise unless the model's layer is of this kind, and in as many parts."""
        require(isinstance(layer, PiKVLayer), "it was saved as a paged layer, and is a sliding one here")
        require(
            layer.has_expert_router == self.routed,
            f"a router was known: {self.routed} there, {layer.has_expert_router} here",
        )
        if self._expert_loads is not None:
            router = None if layer.attachment is None else layer.attachment.expert_routers.get(layer.layer_idx)
            experts, loads = 0 if router is None else router.num_experts, len(self._expert_loads)
            require(experts == loads, f"it has loads of {loads} experts, the router chooses among {experts}")
        parts, numbers = layer.layout.parts, [part.location.number for part in layer.parts]
        fits = (parts, numbers) == (self.spread.parts, self.spread.numbers)
        require(fits, f"it was saved in {self.spread} and has the parts {numbers} of {parts} here")

    # Building

    def restore(self, layer: PiKVLayer, device: torch.device) -> None:
        """Fill an empty layer whose attention is on `device`."""
        layer.store.config = self.config
        layer.store.state = LayerState(
            **{name.removeprefix("_"): value for name, value in self.state.items()},
            padding=None if self.padding is None else torch.tensor(self.padding, device=device),
            expert_loads=None if self._expert_loads is None else self._expert_loads.copy(),
        )
        if self._shards is not None:
            layer.store.shard_map = self._shards.build(self.config, layer.layout.weights)
        if self._tables:
            store, table = layer.store, self._tables[0]
            store.heads, store.dtype, store.device = table.heads, table.dtype, device
        for saved, part in zip(self._parts, layer.parts, strict=True):
            saved.restore(layer, part, device if part.location.device is None else part.location.device)
