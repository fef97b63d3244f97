"""Checking what a file says of a part of a layer, and building its table."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.kv import KV
from ..config import PiKVConfig
from ..layer.layer import PiKVLayer
from ..layer.layer_part import LayerPart
from ..page_table.layer_pools import LayerPools
from ..page_table.page_table import PageTable
from ..page_table.sequence_pages import SequencePages
from ..page_table.sequence_writer import SequenceWriter
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, PoolId
from ..tiers.tier_limits import LayerTiers
from .pool_records import fill_pool, most_pages, pool_of, pool_prefix, pool_specs, restore_companions
from .table_writer import basis_name
from .tensor_file import CacheFileError, Spec, TensorFile


class SavedTable:
    """What a part of a layer stores, in a file.

    Parameters
    ----------
    prefix : str
        What the names of its tensors begin with.
    description : dict
        What :func:`~pikv_hf.serialization.table_writer.describe_part` made of the table.
    file : TensorFile
        Its tensors.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.
    seen : int
        Columns of the layer.
    is_alone : bool
        Whether it is the only part of its layer.
    """

    def __init__(
        self,
        prefix: str,
        description: dict[str, Any],
        file: TensorFile,
        overrides: dict[str, Any],
        seen: int,
        is_alone: bool = True,
    ) -> None:
        self._prefix, self._table, self._file = prefix, description, file
        self._seen, self._is_alone = seen, is_alone
        self.heads: int = description["heads"]
        self.dtype: torch.dtype = getattr(torch, description["dtype"])
        self.config = PiKVConfig.from_dict({**description["config"], **overrides})
        self._lanes = self.heads // description["page_heads"]

    # Checking

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the part, with their dtypes and shapes."""
        specs: dict[str, Spec] = {}
        store = self._empty_store(torch.device("cpu"))
        pools, shards = self._table["pools"], self._table["num_shards"]
        rows, ids = (self._file.specs[f"{self._prefix}.{name}"].shape for name in ("rows", "ids"))
        sequences = self._file.specs[f"{self._prefix}.open"].shape[0]
        shapes = {"rows": rows[:1], "open": (sequences, shards), "lengths": (sequences, 1 + len(pools)), "ids": ids[:1]}
        specs |= {f"{self._prefix}.{name}": Spec(torch.int64, shape) for name, shape in shapes.items()}
        for pool in pools:
            specs |= pool_specs(store.by_id()[pool_of(pool)], pool_prefix(self._prefix, pool_of(pool)), pool)
        for number, codec in enumerate(self._table["codecs"]):
            if codec["basis"]:
                specs |= self._free_spec(basis_name(self._prefix, number), codec["keys"], 1)
        if self._table["queries"]:
            specs |= self._free_spec(f"{self._prefix}.queries", True, 2)
        return specs

    def _free_spec(self, name: str, keys: bool, channels: int) -> dict[str, Spec]:
        """Return the spec of a floating-point tensor per head of which only the dimension of the channels is known."""
        spec = self._file.specs[name]
        expected = self._table["page_heads"], self._table["dims"][0 if keys else 1]
        require(spec.dtype.is_floating_point, f"{name} is {spec.dtype}")
        require(len(spec.shape) == 3 and (spec.shape[0], spec.shape[channels]) == expected, f"{name} is {spec.shape}")
        return {name: spec}

    def check(self) -> None:
        """Raise unless rows, pages and counts fit one another. The specs have been checked."""
        rows, sequences = self.rows, self._sequences()
        numbers = list(dict.fromkeys(rows.tolist()))
        require(numbers == list(range(len(sequences))), f"rows are of sequences {numbers} of {len(sequences)}")
        require(self._lanes > 0 and len(rows) % self._lanes == 0, f"{len(rows)} rows of {self._lanes} lanes each")
        for pool in self._table["pools"]:
            self._check_pool(pool, sequences)
        for window, outside in zip(self.positions(True), self.positions(False), strict=True):
            require(are_distinct([window, outside]), "a row has a position twice")

    @property
    def rows(self) -> np.ndarray:
        """The sequence of each row, `(R,)`."""
        return self._tensor("rows").numpy()

    @property
    def batch(self) -> int:
        """Sequences of the layer: rows, unless these are lanes."""
        return len(self.rows) // self._lanes

    def positions(self, windows: bool) -> list[np.ndarray]:
        """Return for each sequence the positions of its tokens in the window, or of those outside of it."""
        positions = {name: self._tensor("positions", name).numpy() for name in self._names()}
        found = []
        for sequence in self._sequences():
            # The window's pages come first.
            inside = {pool: len(sequence.window) if pool == PLAIN else 0 for pool in positions}
            which = {name: slice(0, end) if windows else slice(end, None) for name, end in inside.items()}
            slots = [known[sequence.pages(name)[which[name]]] for name, known in positions.items()]
            found.append(np.concatenate([each[each >= 0] for each in slots]))
        return found

    def windows(self) -> Iterator[list[torch.Tensor]]:
        """Yield for each sequence the positions `(n,)`, experts, keys and values `(n, H, D)` of its window's tokens."""
        for sequence in self._sequences():
            pages = torch.tensor(sequence.window, dtype=torch.int64)
            positions, experts, keys, values = (
                self._tensor(name, PLAIN)[pages] for name in ("positions", "experts", "tokens.0", "tokens.1")
            )
            held = positions >= 0
            yield [positions[held], experts[held], keys.transpose(1, 2)[held], values.transpose(1, 2)[held]]

    def check_beside(self, first: "SavedTable") -> None:
        """Raise unless this part has the rows, and the window, of the first part of its layer. Both have been checked.

        All parts have the tokens of the window, and read only the first part's.
        """
        for name in ("heads", "page_heads", "dims", "dtype", "config", "num_shards", "recent_window", "sink_pages"):
            here, there = self._table[name], first._table[name]
            require(here == there, f"its {name} is {here}, that of the first part {there}")
        rows, others = self.rows.tolist(), first.rows.tolist()
        require(rows == others, f"its rows are of the sequences {rows}, those of the first part of {others}")
        for number, (here, there) in enumerate(zip(self.windows(), first.windows(), strict=True)):
            alike = all(_are_same(one, other) for one, other in zip(here, there, strict=True))
            require(alike, f"the window of sequence {number} is not that of the first part")

    def _check_pool(self, pool: dict[str, Any], sequences: list[SequencePages]) -> None:
        """Check the pages of a pool."""
        of, name = pool_of(pool), pool["name"]
        size, shards = self.config.page_size, self._table["num_shards"]
        positions, count, shard = (self._tensor(part, of).numpy() for part in ("positions", "count", "shard"))
        held = positions >= 0
        first = np.arange(size) < count[:, None]
        require(bool((held == first).all() and (count <= size).all()), f"counts of pool {name!r} are wrong")
        require(bool((positions < self._seen).all()), f"positions in pool {name!r} reach beyond {self._seen}")
        require(bool(((shard >= -1) & (shard < shards)).all()), f"shards in pool {name!r} are not below {shards}")
        new, most = self._tensor("numbers", of).numpy(), pool["capacity"]
        fit = len(new) <= most <= most_pages(len(new)) and ((new >= 0) & (new < most)).all()
        require(bool(fit and (np.diff(new) > 0).all()), f"pages of pool {name!r} have the numbers {new} of {most}")
        in_use = np.zeros(len(count), dtype=np.bool_)
        for pages in (sequence.pages(of) for sequence in sequences):
            require(not len(pages) or 0 <= pages.min() <= pages.max() < len(count), f"page numbers in pool {name!r}")
            in_use[pages] = True
        require(bool(in_use.all()), f"pool {name!r} has pages that no row holds")
        if not name:
            self._check_fill(sequences, count, shard)

    def _check_fill(self, sequences: list[SequencePages], count: np.ndarray, shard: np.ndarray) -> None:
        size, kept = self.config.page_size, self._tensor("kept", PLAIN).numpy()
        for each in sequences:
            window, is_open = np.array(each.window[:-1], dtype=np.int64), each.open >= 0
            partial = count[each.open[is_open]]
            # Cut by a crop where parts have given pages to each other; see :mod:`pikv_hf.page_table.cropping`.
            may_be_cut = kept[each.full] & (count[each.full] > 0) & (not self._is_alone)
            is_full = np.append(count[window] == size, (count[each.full] == size) | may_be_cut)
            require(bool(is_full.all()), "a page that should be full is not")
            require(bool(((partial > 0) & (partial < size)).all()), "an open page is empty or full")
            shards = shard[each.open[is_open]]
            require(bool((shards == np.flatnonzero(is_open)).all()), f"open pages of the shards {shards.tolist()}")

    # Building

    def build(self, layer: PiKVLayer, part: LayerPart, device: torch.device) -> PageTable:
        """Return the table, for a part of a layer that knows its options, expert loads and shards already."""
        store, pools = self._empty_store(device, part.tiers), self._table["pools"]
        books = [(store.by_id()[pool_of(pool)], pool_prefix(self._prefix, pool_of(pool)), pool) for pool in pools]
        for book, prefix, pool in books:
            fill_pool(book, prefix, pool, self._file)
        if self._table["queries"]:
            store.encoders.remember_queries(self._tensor("queries").to(device, copy=True), self._table["query_scale"])
        sequences = self._sequences({pool_of(pool): self._tensor("numbers", pool_of(pool)).numpy() for pool in pools})
        for sequence in sequences:
            store.incref(sequence)
        sinks = self._table["sink_pages"] * store.plain.page_size
        shards, window = self._table["num_shards"], self._table["recent_window"]
        writer = SequenceWriter(store, shards, window, sinks, layer.store.shard_of())
        part.assign_shards(writer, layer.store.shard_map)
        table = PageTable.from_rows(writer, [sequences[number] for number in self.rows.tolist()])
        if part.page_router is not None:
            store.keep_bounds()
        if part.scheduler is not None:
            part.scheduler.prepare(table)
        for book, prefix, pool in books:
            restore_companions(book, prefix, pool, self._file)
        return table

    def _empty_store(self, device: torch.device, tiers: LayerTiers | None = None) -> LayerPools:
        """Return a store with pools of no pages and the saved codecs."""
        (keys, values), size = self._table["dims"], self.config.page_size
        plain = PlainPool(self._table["page_heads"], keys, values, size, self.dtype, device)
        store = LayerPools(plain, self.config, tiers)
        codecs = [self._codec(number, codec, device) for number, codec in enumerate(self._table["codecs"])]
        for encoder, known in zip(store.encoders.in_use, self._table["sealers"], strict=False):
            encoder.codecs.update({name: codecs[number] for name, number in known.items()})
        for pool in self._table["pools"]:
            if pool_of(pool) != PLAIN:
                made = store.packed_pool(*(codecs[number] for number in pool["codecs"]))
                require(made.name == pool["name"], f"pool {pool['name']!r} has the codecs of {made.name!r}")
        return store

    def _codec(self, number: int, saved: dict[str, Any], device: torch.device) -> Codec:
        basis = self._file[basis_name(self._prefix, number)].to(device, copy=True) if saved["basis"] else None
        return Codec(saved["name"], KV.KEYS if saved["keys"] else KV.VALUES, saved["rank"], basis)

    # Reading

    def _names(self) -> list[PoolId]:
        return [pool_of(pool) for pool in self._table["pools"]]

    def _tensor(self, name: str, pool: PoolId | None = None) -> torch.Tensor:
        return self._file[f"{self._prefix if pool is None else pool_prefix(self._prefix, pool)}.{name}"]

    def _sequences(self, numbers: dict[PoolId, np.ndarray] | None = None) -> list[SequencePages]:
        """Return the distinct sequences, with page numbers of the file, or those `(n,)` of each pool in their place."""
        names = [pool for pool in self._names() if pool != PLAIN]
        lengths, ids = self._tensor("lengths").numpy(), self._tensor("ids").numpy()
        require(bool((lengths >= 0).all()) and lengths.sum() == len(ids), f"{len(ids)} pages for {lengths.sum()}")
        sequences = []
        parts = iter(np.split(ids, np.cumsum(lengths.reshape(-1))[:-1]))
        for opened in self._tensor("open").numpy():
            window, sealed, *packed = (next(parts).copy() for _ in range(lengths.shape[1]))
            held = {name: pages for name, pages in zip(names, packed, strict=True) if len(pages)}
            sequences.append(SequencePages(window.tolist(), opened.copy(), sealed, held))
        return sequences if numbers is None else [_renumbered(sequence, numbers) for sequence in sequences]


def _renumbered(sequence: SequencePages, numbers: dict[PoolId, np.ndarray]) -> SequencePages:
    plain = numbers[PLAIN]
    opened = np.array([plain[page] if page >= 0 else -1 for page in sequence.open], dtype=np.int64)
    packed = {name: numbers[name][pages] for name, pages in sequence.packed.items()}
    return SequencePages([int(plain[page]) for page in sequence.window], opened, plain[sequence.full], packed)


def are_distinct(positions: Sequence[np.ndarray]) -> bool:
    """Return whether no position is there twice."""
    return int(np.bincount(np.concatenate(positions), minlength=1).max()) <= 1


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes, whatever numbers these are."""
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`CacheFileError` unless something holds."""
    if not holds:
        raise CacheFileError(otherwise)
