"""Checking what a file says of the pages of a part of a layer, and building its table."""

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
from .format import CODEC, ENCODERS, POOL, TABLE, basis_name, pool_prefix, read_keys
from .pool_records import fill_pool, most_pages, pool_specs, restore_bounds_and_usage
from .tensor_file import Section, Spec, require

#: Keys of a table that are the same in all parts of a layer.
SAME_IN_ALL_PARTS = (
    *("heads", "page_heads", "key_dim", "value_dim", "dtype"),
    *("config", "num_shards", "recent_window", "sink_pages"),
)


class TableLoader:
    """Checks what a file says of a part's table, and builds it.

    Parameters
    ----------
    section : Section
        Its tensors.
    description : dict
        What :func:`~pikv_hf.serialization.table_writer.describe_table` made.
    overrides : dict
        Options of :class:`PiKVConfig` in place of what was saved.
    seen : int
        Columns of the layer.
    is_alone : bool
        Whether it is the only part of its layer.
    """

    def __init__(
        self, section: Section, description: Any, overrides: dict[str, Any], seen: int, is_alone: bool = True
    ) -> None:
        self._section, self._seen, self._is_alone = section, seen, is_alone
        self._table = table = read_keys(TABLE, description, "its table")
        self._pools = [read_keys(POOL, pool, "a pool") for pool in table["pools"]]
        self._codecs = [read_keys(CODEC, codec, "a codec") for codec in table["codecs"]]
        encoders = table["encoders"] and read_keys(ENCODERS, table["encoders"], "its encoders")
        self._encoders: list[dict[str, int]] = list(encoders.values()) if encoders else []
        self.heads: int = table["heads"]
        self.dtype: torch.dtype = getattr(torch, table["dtype"])
        self.config = PiKVConfig.from_dict({**table["config"], **overrides})
        self._lanes = self.heads // table["page_heads"]

    # Checking

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the part, with their dtypes and shapes."""
        pools = self._empty_pools(torch.device("cpu"))
        rows, numbers = (self._section.spec(name).shape for name in ("rows", "page_numbers"))
        sequences = self._section.spec("open_pages").shape[0]
        shapes = {
            "rows": rows[:1],
            "open_pages": (sequences, self._table["num_shards"]),
            "page_counts": (sequences, 1 + len(self._pools)),
            "page_numbers": numbers[:1],
        }
        specs = {self._section.name(name): Spec(torch.int64, shape) for name, shape in shapes.items()}
        for saved in self._pools:
            which = PoolId.parse(saved["name"])
            specs |= pool_specs(pools.by_id()[which], self._of_pool(which).prefix, saved)
        for number, codec in enumerate(self._codecs):
            if codec["has_basis"]:
                specs |= self._free_spec(basis_name(self._section.prefix, number), codec["keys"], 1)
        if self._table["has_queries"]:
            specs |= self._free_spec(self._section.name("queries"), True, 2)
        return specs

    def _free_spec(self, name: str, keys: bool, channels: int) -> dict[str, Spec]:
        """Return the spec of a floating-point tensor per head of which only the dimension of the channels is known."""
        spec = self._section.file.specs[name]
        expected = self._table["page_heads"], self._table["key_dim" if keys else "value_dim"]
        require(spec.dtype.is_floating_point, f"{name} is {spec.dtype}")
        require(len(spec.shape) == 3 and (spec.shape[0], spec.shape[channels]) == expected, f"{name} is {spec.shape}")
        return {name: spec}

    def check(self) -> None:
        """Raise unless rows, pages and counts fit one another. The specs have been checked."""
        rows, sequences = self.rows, self._sequences()
        numbers = list(dict.fromkeys(rows.tolist()))
        require(numbers == list(range(len(sequences))), f"rows are of sequences {numbers} of {len(sequences)}")
        require(self._lanes > 0 and len(rows) % self._lanes == 0, f"{len(rows)} rows of {self._lanes} lanes each")
        for pool in self._pools:
            self._check_pool(pool, sequences)
        for window, outside in zip(self.positions(True), self.positions(False), strict=True):
            require(are_distinct([window, outside]), "a row has a position twice")

    @property
    def rows(self) -> np.ndarray:
        """The sequence of each row, `(R,)`."""
        return self._section["rows"].numpy()

    @property
    def batch(self) -> int:
        """Sequences of the layer: rows, unless these are lanes."""
        return len(self.rows) // self._lanes

    def positions(self, windows: bool) -> list[np.ndarray]:
        """Return for each sequence the positions of its tokens in the window, or of those outside of it."""
        positions = {which: self._of_pool(which)["positions"].numpy() for which in self._pool_ids()}
        found = []
        for sequence in self._sequences():
            # The window's pages come first.
            inside = {which: len(sequence.window) if which == PLAIN else 0 for which in positions}
            parts = {which: slice(0, end) if windows else slice(end, None) for which, end in inside.items()}
            slots = [known[sequence.pages(which)[parts[which]]] for which, known in positions.items()]
            found.append(np.concatenate([each[each >= 0] for each in slots]))
        return found

    def windows(self) -> Iterator[list[torch.Tensor]]:
        """Yield for each sequence the positions `(n,)`, experts, keys and values `(n, H, D)` of its window's tokens."""
        for sequence in self._sequences():
            pages = torch.tensor(sequence.window, dtype=torch.int64)
            plain = self._of_pool(PLAIN)
            positions, experts, keys, values = (plain[n][pages] for n in ("positions", "experts", "keys", "values"))
            held = positions >= 0
            yield [positions[held], experts[held], keys.transpose(1, 2)[held], values.transpose(1, 2)[held]]

    def check_beside(self, first: "TableLoader") -> None:
        """Raise unless this part has the rows, and the window, of the first part of its layer. Both have been checked.

        All parts have the tokens of the window, and read only the first part's.
        """
        for name in SAME_IN_ALL_PARTS:
            here, there = self._table[name], first._table[name]
            require(here == there, f"its {name} is {here}, that of the first part {there}")
        rows, others = self.rows.tolist(), first.rows.tolist()
        require(rows == others, f"its rows are of the sequences {rows}, those of the first part of {others}")
        for number, (here, there) in enumerate(zip(self.windows(), first.windows(), strict=True)):
            alike = all(_are_same(one, other) for one, other in zip(here, there, strict=True))
            require(alike, f"the window of sequence {number} is not that of the first part")

    def _check_pool(self, pool: dict[str, Any], sequences: list[SequencePages]) -> None:
        """Check the pages of a pool."""
        which, size, shards = PoolId.parse(pool["name"]), self.config.page_size, self._table["num_shards"]
        name, tensors = pool["name"], self._of_pool(which)
        positions, count, shard = (tensors[part].numpy() for part in ("positions", "count", "shard"))
        held = positions >= 0
        first = np.arange(size) < count[:, None]
        require(bool((held == first).all() and (count <= size).all()), f"counts of pool {name!r} are wrong")
        require(bool((positions < self._seen).all()), f"positions in pool {name!r} reach beyond {self._seen}")
        require(bool(((shard >= -1) & (shard < shards)).all()), f"shards in pool {name!r} are not below {shards}")
        new, most = tensors["numbers"].numpy(), pool["capacity"]
        fit = len(new) <= most <= most_pages(len(new)) and ((new >= 0) & (new < most)).all()
        require(bool(fit and (np.diff(new) > 0).all()), f"pages of pool {name!r} have the numbers {new} of {most}")
        in_use = np.zeros(len(count), dtype=np.bool_)
        for pages in (sequence.pages(which) for sequence in sequences):
            require(not len(pages) or 0 <= pages.min() <= pages.max() < len(count), f"page numbers in pool {name!r}")
            in_use[pages] = True
        require(bool(in_use.all()), f"pool {name!r} has pages that no row holds")
        if which == PLAIN:
            self._check_fill(sequences, count, shard)

    def _check_fill(self, sequences: list[SequencePages], count: np.ndarray, shard: np.ndarray) -> None:
        size, left = self.config.page_size, self._of_pool(PLAIN)["incompressible"].numpy()
        for each in sequences:
            window, is_open = np.array(each.window[:-1], dtype=np.int64), each.open >= 0
            partial = count[each.open[is_open]]
            # Cut by a crop where parts have given pages to each other; see :mod:`pikv_hf.page_table.cropping`.
            may_be_cut = left[each.full] & (count[each.full] > 0) & (not self._is_alone)
            is_full = np.append(count[window] == size, (count[each.full] == size) | may_be_cut)
            require(bool(is_full.all()), "a page that should be full is not")
            require(bool(((partial > 0) & (partial < size)).all()), "an open page is empty or full")
            shards = shard[each.open[is_open]]
            require(bool((shards == np.flatnonzero(is_open)).all()), f"open pages of the shards {shards.tolist()}")

    # Building

    def build(self, layer: PiKVLayer, part: LayerPart, device: torch.device) -> PageTable:
        """Return the table, for a part of a layer that knows its options, expert loads and shards already."""
        pools, which = self._empty_pools(device, part.tiers), self._pool_ids()
        restored = [
            (pools.by_id()[each], saved, self._of_pool(each)) for each, saved in zip(which, self._pools, strict=True)
        ]
        for each in restored:
            fill_pool(*each)
        if self._table["has_queries"]:
            pools.encoders.remember_queries(self._section["queries"].to(device, copy=True), self._table["query_scale"])
        sequences = self._sequences({each: self._of_pool(each)["numbers"].numpy() for each in which})
        for sequence in sequences:
            pools.incref(sequence)
        sinks = self._table["sink_pages"] * pools.plain.page_size
        shards, window = self._table["num_shards"], self._table["recent_window"]
        writer = SequenceWriter(pools, shards, window, sinks, layer.store.shard_of())
        part.assign_shards(writer, layer.store.shard_map)
        table = PageTable.from_rows(writer, [sequences[number] for number in self.rows.tolist()])
        if part.page_router is not None:
            pools.keep_bounds()
        if part.scheduler is not None:
            part.scheduler.prepare(table)
        for each in restored:
            restore_bounds_and_usage(*each)
        return table

    def _empty_pools(self, device: torch.device, tiers: LayerTiers | None = None) -> LayerPools:
        """Return pools of no pages, with the saved codecs."""
        table, size = self._table, self.config.page_size
        plain = PlainPool(table["page_heads"], table["key_dim"], table["value_dim"], size, self.dtype, device)
        pools = LayerPools(plain, self.config, tiers)
        codecs = [self._codec(number, codec, device) for number, codec in enumerate(self._codecs)]
        for encoder, known in zip(pools.encoders.in_use, self._encoders, strict=False):
            encoder.codecs.update({name: codecs[number] for name, number in known.items()})
        for pool in self._pools:
            if PoolId.parse(pool["name"]) != PLAIN:
                made = pools.packed_pool(codecs[pool["key_codec"]], codecs[pool["value_codec"]])
                require(made.id.name == pool["name"], f"pool {pool['name']!r} has the codecs of {made.id.name!r}")
        return pools

    def _codec(self, number: int, saved: dict[str, Any], device: torch.device) -> Codec:
        basis = None
        if saved["has_basis"]:
            basis = self._section.file[basis_name(self._section.prefix, number)].to(device, copy=True)
        return Codec(saved["name"], KV.KEYS if saved["keys"] else KV.VALUES, saved["rank"], basis)

    # Reading

    def _pool_ids(self) -> list[PoolId]:
        return [PoolId.parse(pool["name"]) for pool in self._pools]

    def _of_pool(self, which: PoolId) -> Section:
        return Section(self._section.file, pool_prefix(self._section.prefix, which.name))

    def _sequences(self, numbers: dict[PoolId, np.ndarray] | None = None) -> list[SequencePages]:
        """Return the distinct sequences, with page numbers of the file, or those `(n,)` of each pool in their place."""
        packed_pools = [which for which in self._pool_ids() if which != PLAIN]
        counts, pages = self._section["page_counts"].numpy(), self._section["page_numbers"].numpy()
        require(bool((counts >= 0).all()) and counts.sum() == len(pages), f"{len(pages)} pages for {counts.sum()}")
        sequences = []
        parts = iter(np.split(pages, np.cumsum(counts.reshape(-1))[:-1]))
        for opened in self._section["open_pages"].numpy():
            window, full, *packed = (next(parts).copy() for _ in range(counts.shape[1]))
            held = {which: pages for which, pages in zip(packed_pools, packed, strict=True) if len(pages)}
            sequences.append(SequencePages(window.tolist(), opened.copy(), full, held))
        return sequences if numbers is None else [_renumbered(sequence, numbers) for sequence in sequences]


def _renumbered(sequence: SequencePages, numbers: dict[PoolId, np.ndarray]) -> SequencePages:
    plain = numbers[PLAIN]
    opened = np.array([plain[page] if page >= 0 else -1 for page in sequence.open], dtype=np.int64)
    packed = {which: numbers[which][pages] for which, pages in sequence.packed.items()}
    return SequencePages([int(plain[page]) for page in sequence.window], opened, plain[sequence.full], packed)


def are_distinct(positions: Sequence[np.ndarray]) -> bool:
    """Return whether no position is there twice."""
    return int(np.bincount(np.concatenate(positions), minlength=1).max()) <= 1


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes, whatever numbers these are."""
    same_kind = one.shape == other.shape and one.dtype == other.dtype
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
