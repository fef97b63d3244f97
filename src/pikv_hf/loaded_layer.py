"""Checking what a file says of a layer, and building the layer from it. See :mod:`pikv_hf.saved_layer`."""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .codecs import Codec
from .config import PiKVConfig
from .layer import PiKVLayer
from .pages import PagePool
from .saved_layer import SCHEDULE, STATE, basis_name
from .saved_pages import fill_pool, most_pages, pool_prefix, pool_specs, restore_companions
from .sequence import SequencePages
from .store import PageStore
from .table import PageTable
from .tensor_file import CacheFileError, Spec, TensorFile
from .tiers import LayerTiers
from .writer import SequenceWriter


class SavedSliding:
    """A bounded sliding layer in a file.

    Parameters
    ----------
    index : int
        The model layer.
    description : dict
        What :func:`~pikv_hf.saved_layer.describe_layer` made.
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
            _require(len(shapes[0]) == 4 and shapes[0][:3] == shapes[1][:3], f"K/V have the shapes {shapes}")
            held, most = shapes[0][2], min(self.seen, max(0, self.window - 1))
            _require(held <= most, f"{held} tokens are held of {self.seen}, in a window of {self.window}")

    def check_fits(self, layer: Any) -> None:
        """Raise unless the model's layer is of this kind."""
        window = getattr(layer, "sliding_window", None)
        _require(window == self.window, f"it was saved with a sliding window of {self.window}, the model's is {window}")

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
        What :func:`~pikv_hf.saved_layer.describe_layer` made.
    file : TensorFile
        Its tensors.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.
    """

    def __init__(self, index: int, description: dict[str, Any], file: TensorFile, overrides: dict[str, Any]) -> None:
        self._prefix, self._file = f"layers.{index}", file
        self.config = PiKVConfig.from_dict({**description["config"], **overrides})
        self.state = {name: description["state"][name] for name in STATE}
        self.padding: list[int] | None = description["padding"]
        self.routed: bool = description["routed"]
        self.schedule: dict[str, Any] | None = description["schedule"]
        self.table: dict[str, Any] | None = description["table"]
        if self.table is not None:
            self.dtype = getattr(torch, self.table["dtype"])
            self.store_config = PiKVConfig.from_dict({**self.table["config"], **overrides})
            self._lanes = self.table["heads"] // self.table["page_heads"]

    # Checking

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer, with their dtypes and shapes."""
        specs: dict[str, Spec] = {}
        if self.schedule is not None and self.schedule["queries"]:
            name = f"{self._prefix}.schedule.queries"
            specs[name] = self._file.specs[name]
            _require(specs[name].dtype.is_floating_point and len(specs[name].shape) == 4, f"{name} is {specs[name]}")
        if self.table is None:
            return specs
        store = self._empty_store(torch.device("cpu"))
        pools, shards = self.table["pools"], self.table["num_shards"]
        rows, ids = (self._file.specs[f"{self._prefix}.{name}"].shape for name in ("rows", "ids"))
        sequences = self._file.specs[f"{self._prefix}.open"].shape[0]
        shapes = {"rows": rows[:1], "open": (sequences, shards), "lengths": (sequences, 1 + len(pools)), "ids": ids[:1]}
        specs |= {f"{self._prefix}.{name}": Spec(torch.int64, shape) for name, shape in shapes.items()}
        for pool in pools:
            specs |= pool_specs(store.pools()[pool["name"]], pool_prefix(self._prefix, pool["name"]), pool)
        for number, codec in enumerate(self.table["codecs"]):
            if codec["basis"]:
                specs |= self._free_spec(basis_name(self._prefix, number), codec["keys"], 1)
        if self.table["queries"]:
            specs |= self._free_spec(f"{self._prefix}.queries", True, 2)
        return specs

    def _free_spec(self, name: str, keys: bool, channels: int) -> dict[str, Spec]:
        """Return the spec of a floating-point tensor per head of which only the dimension of the channels is known."""
        assert self.table is not None
        spec = self._file.specs[name]
        expected = self.table["page_heads"], self.table["dims"][0 if keys else 1]
        _require(spec.dtype.is_floating_point, f"{name} is {spec.dtype}")
        _require(len(spec.shape) == 3 and (spec.shape[0], spec.shape[channels]) == expected, f"{name} is {spec.shape}")
        return {name: spec}

    def check(self) -> None:
        """Raise unless rows, pages and counts fit one another. The specs have been checked."""
        state = self.state
        _require(all(state[name] >= 0 for name in ("seen", "dropped", "_assigned")), f"negative lengths in {state}")
        if self.table is None:
            return
        rows, sequences = self._tensor("rows").numpy(), self._sequences()
        numbers = list(dict.fromkeys(rows.tolist()))
        _require(numbers == list(range(len(sequences))), f"rows are of sequences {numbers} of {len(sequences)}")
        _require(self._lanes > 0 and len(rows) % self._lanes == 0, f"{len(rows)} rows of {self._lanes} lanes each")
        batch = len(rows) // self._lanes
        _require(self.padding is None or len(self.padding) == batch, f"{batch} rows, paddings {self.padding}")
        held = [self._check_pool(pool, sequences) for pool in self.table["pools"]]
        for positions in zip(*held, strict=True):
            _require(int(np.bincount(np.concatenate(positions), minlength=1).max()) <= 1, "a row has a position twice")

    def _check_pool(self, pool: dict[str, Any], sequences: list[SequencePages]) -> list[np.ndarray]:
        """Check the pages of a pool; returns the positions of the tokens that each sequence has there."""
        assert self.table is not None
        name, size, shards = pool["name"], self.config.page_size, self.table["num_shards"]
        positions, count, shard = (self._tensor(part, name).numpy() for part in ("positions", "count", "shard"))
        held = positions >= 0
        first = np.arange(size) < count[:, None]
        _require(bool((held == first).all() and (count <= size).all()), f"counts of pool {name!r} are wrong")
        columns = self.state["seen"]
        _require(bool((positions < columns).all()), f"positions in pool {name!r} reach beyond {columns}")
        _require(bool(((shard >= -1) & (shard < shards)).all()), f"shards in pool {name!r} are not below {shards}")
        new, most = self._tensor("numbers", name).numpy(), pool["capacity"]
        fit = len(new) <= most <= most_pages(len(new)) and ((new >= 0) & (new < most)).all()
        _require(bool(fit and (np.diff(new) > 0).all()), f"pages of pool {name!r} have the numbers {new} of {most}")
        in_use = np.zeros(len(count), dtype=np.bool_)
        for pages in (sequence.pages(name) for sequence in sequences):
            _require(not len(pages) or 0 <= pages.min() <= pages.max() < len(count), f"page numbers in pool {name!r}")
            in_use[pages] = True
        _require(bool(in_use.all()), f"pool {name!r} has pages that no row holds")
        if not name:
            self._check_fill(sequences, count, shard)
        return [positions[pages][held[pages]] for pages in (sequence.pages(name) for sequence in sequences)]

    def _check_fill(self, sequences: list[SequencePages], count: np.ndarray, shard: np.ndarray) -> None:
        size = self.config.page_size
        for each in sequences:
            full = np.array([*each.window[:-1], *each.sealed], dtype=np.int64)
            is_open = each.open >= 0
            partial = count[each.open[is_open]]
            _require(bool((count[full] == size).all()), "a page that should be full is not")
            _require(bool(((partial > 0) & (partial < size)).all()), "an open page is empty or full")
            shards = shard[each.open[is_open]]
            _require(bool((shards == np.flatnonzero(is_open)).all()), f"open pages of the shards {shards.tolist()}")

    def check_fits(self, layer: Any) -> None:
        """Raise unless the model's layer is of this kind."""
        _require(isinstance(layer, PiKVLayer), "it was saved as a paged layer, and is a sliding one here")
        _require(layer.routed == self.routed, f"a router was known: {self.routed} there, {layer.routed} here")

    # Building

    def restore(self, layer: PiKVLayer, device: torch.device) -> None:
        """Fill an empty layer."""
        layer.config = self.config
        self._restore_schedule(layer, device)
        if self.table is not None:
            layer.heads, layer.dtype, layer.device = self.table["heads"], self.dtype, device
            layer.table = self._build_table(layer, device)
        for name, value in self.state.items():
            setattr(layer, name, value)
        layer._padding = None if self.padding is None else torch.tensor(self.padding, device=device)

    def _build_table(self, layer: PiKVLayer, device: torch.device) -> PageTable:
        assert self.table is not None
        store, pools = self._empty_store(device, layer.tiers), self.table["pools"]
        books = [(store.pools()[pool["name"]], pool_prefix(self._prefix, pool["name"]), pool) for pool in pools]
        for book, prefix, pool in books:
            fill_pool(book, prefix, pool, self._file)
        if self.table["queries"]:
            store.observe(self._tensor("queries").to(device, copy=True), self.table["query_scale"])
        sequences = self._sequences({pool["name"]: self._tensor("numbers", pool["name"]).numpy() for pool in pools})
        for sequence in sequences:
            store.hold(sequence)
        sinks = self.table["sink_pages"] * store.plain.page_size
        shards, window = self.table["num_shards"], self.table["recent_window"]
        writer = SequenceWriter(store, shards, window, sinks, layer._shard_of())
        table = PageTable.of(writer, [sequences[number] for number in self._tensor("rows").tolist()])
        if layer.router is not None:
            store.know_bounds()
        if layer.schedule is not None:
            layer.schedule.prepare(table)
        for book, prefix, pool in books:
            restore_companions(book, prefix, pool, self._file)
        return table

    def _restore_schedule(self, layer: PiKVLayer, device: torch.device) -> None:
        """Let the layer's schedule, if its options ask for one now, know what the saved one knew."""
        if layer.schedule is None or self.schedule is None:
            return
        for name in SCHEDULE:
            setattr(layer.schedule, name, self.schedule["state"][name])
        kind, options = self.schedule["policy"]
        if type(layer.schedule.policy).__name__ == kind:
            layer.schedule.policy = dataclasses.replace(layer.schedule.policy, **options)  # type: ignore[type-var]
        if self.schedule["queries"] and layer.schedule.policy.reads_bounds:
            layer.schedule.queries = self._tensor("schedule.queries").to(device, copy=True)

    def _empty_store(self, device: torch.device, tiers: LayerTiers | None = None) -> PageStore:
        """Return a store with pools of no pages and the saved codecs."""
        assert self.table is not None
        (keys, values), size = self.table["dims"], self.store_config.page_size
        plain = PagePool(self.table["page_heads"], keys, values, size, self.dtype, device)
        store = PageStore(plain, self.store_config, tiers)
        codecs = [self._codec(number, codec, device) for number, codec in enumerate(self.table["codecs"])]
        for sealer, known in zip(store._sealers or (), self.table["sealers"], strict=False):
            sealer.codecs.update({name: codecs[number] for name, number in known.items()})
        for pool in self.table["pools"]:
            if pool["name"]:
                made = store._pool(*(codecs[number] for number in pool["codecs"]))
                _require(made.name == pool["name"], f"pool {pool['name']!r} has the codecs of {made.name!r}")
        return store

    def _codec(self, number: int, saved: dict[str, Any], device: torch.device) -> Codec:
        basis = self._file[basis_name(self._prefix, number)].to(device, copy=True) if saved["basis"] else None
        return Codec(saved["name"], saved["keys"], saved["rank"], basis)

    # Reading

    def _tensor(self, name: str, pool: str | None = None) -> torch.Tensor:
        return self._file[f"{self._prefix if pool is None else pool_prefix(self._prefix, pool)}.{name}"]

    def _sequences(self, numbers: dict[str, np.ndarray] | None = None) -> list[SequencePages]:
        """Return the distinct sequences, with page numbers of the file, or those `(n,)` of each pool in their place."""
        assert self.table is not None
        names = [pool["name"] for pool in self.table["pools"] if pool["name"]]
        lengths, ids = self._tensor("lengths").numpy(), self._tensor("ids").numpy()
        _require(bool((lengths >= 0).all()) and lengths.sum() == len(ids), f"{len(ids)} pages for {lengths.sum()}")
        sequences = []
        parts = iter(np.split(ids, np.cumsum(lengths.reshape(-1))[:-1]))
        for opened in self._tensor("open").numpy():
            window, sealed, *packed = (next(parts).copy() for _ in range(lengths.shape[1]))
            held = {name: pages for name, pages in zip(names, packed, strict=True) if len(pages)}
            sequences.append(SequencePages(window.tolist(), opened.copy(), sealed, held))
        return sequences if numbers is None else [_renumbered(sequence, numbers) for sequence in sequences]


def _renumbered(sequence: SequencePages, numbers: dict[str, np.ndarray]) -> SequencePages:
    plain = numbers[""]
    opened = np.array([plain[page] if page >= 0 else -1 for page in sequence.open], dtype=np.int64)
    packed = {name: numbers[name][pages] for name, pages in sequence.packed.items()}
    return SequencePages([int(plain[page]) for page in sequence.window], opened, plain[sequence.sealed], packed)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CacheFileError(otherwise)
