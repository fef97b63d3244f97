"""Reading what a file says of the pages of one part of a layer."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..codecs.codec import Codec
from ..common.kv import KV
from ..page_table.layer_pools import LayerPools
from ..page_table.sequence_pages import SequencePages
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, PoolId
from ..tiers.tier_limits import LayerTiers
from .format import CODEC, ENCODERS, POOL, TABLE, basis_name, pool_prefix, read_keys
from .pool_records import pool_specs
from .saved_options import loaded_options
from .tensor_file import Section, Spec, require


class TableReader:
    """Reads what a file says of the pages of one part of a layer; nothing is checked but keys, dtypes and shapes.

    Parameters
    ----------
    section : Section
        Its tensors.
    description : dict
        What :func:`~pikv_hf.serialization.table_writer.describe_table` made.
    overrides : dict
        Options of :class:`~pikv_hf.PiKVConfig` in place of what was saved.
    seen : int
        Columns of the layer.
    is_alone : bool
        Whether it is the only part of its layer.

    Attributes
    ----------
    section, seen, is_alone
        As given.
    description : dict
        See :data:`~pikv_hf.serialization.format.TABLE`.
    pools : list of dict
        See :data:`~pikv_hf.serialization.format.POOL`.
    config : PiKVConfig
        The options, overridden ones included.
    heads, dtype
        KV heads and dtype of keys and values.
    lanes : int
        Rows per sequence: one, or one per KV head.
    """

    def __init__(
        self, section: Section, description: Any, overrides: dict[str, Any], seen: int, is_alone: bool = True
    ) -> None:
        self.section, self.seen, self.is_alone = section, seen, is_alone
        self.description = table = read_keys(TABLE, description, "its table")
        self.pools = [read_keys(POOL, pool, "a pool") for pool in table["pools"]]
        self._codecs = [read_keys(CODEC, codec, "a codec") for codec in table["codecs"]]
        encoders = table["encoders"] and read_keys(ENCODERS, table["encoders"], "its encoders")
        self._encoders: list[dict[str, int]] = list(encoders.values()) if encoders else []
        self.heads: int = table["heads"]
        self.dtype: torch.dtype = getattr(torch, table["dtype"])
        self.config = loaded_options(table["config"], overrides)
        self.lanes = self.heads // table["page_heads"]

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the part, with their dtypes and shapes."""
        pools = self.empty_pools(torch.device("cpu"), rotary_values=bool(self.rotary_values))
        rows, numbers = (self.section.spec(name).shape for name in ("rows", "page_numbers"))
        sequences = self.section.spec("open_pages").shape[0]
        shapes = {
            "rows": rows[:1],
            "open_pages": (sequences, self.description["num_shards"]),
            "page_counts": (sequences, 1 + len(self.pools)),
            "page_numbers": numbers[:1],
        }
        specs = {self.section.name(name): Spec(torch.int64, shape) for name, shape in shapes.items()}
        for saved in self.pools:
            pool_id = PoolId.parse(saved["name"])
            specs |= pool_specs(pools.by_id()[pool_id], self.tensors_of(pool_id).prefix, saved)
        for number, codec in enumerate(self._codecs):
            if codec["has_basis"]:
                specs |= self._free_spec(basis_name(self.section.prefix, number), codec["keys"], 1)
        if self.description["has_queries"]:
            specs |= self._free_spec(self.section.name("queries"), True, 2)
        return specs

    @property
    def rotary_values(self) -> bool | None:
        """Whether bounds of keys have those of the values with them, None if there are no bounds."""
        widths = []
        for pool in self.pools:
            section = self.tensors_of(PoolId.parse(pool["name"]))
            if section.name("rotary_bounds.ends") in section.file.specs:
                return True
            if pool["has_bounds"] and section.name("bounds.ends") in section.file.specs:
                widths.append(section.spec("bounds.ends").shape[-1])
        return max(widths) != 2 * self.description["key_dim"] if widths else None

    def _free_spec(self, name: str, keys: bool, channels: int) -> dict[str, Spec]:
        """Return the spec of a floating-point tensor per head of which only the dimension of the channels is known."""
        spec = self.section.file.specs[name]
        expected = self.description["page_heads"], self.description["key_dim" if keys else "value_dim"]
        require(spec.dtype.is_floating_point, f"{name} is {spec.dtype}")
        require(len(spec.shape) == 3 and (spec.shape[0], spec.shape[channels]) == expected, f"{name} is {spec.shape}")
        return {name: spec}

    def pool_ids(self) -> list[PoolId]:
        """Return the pools of :attr:`pools`."""
        return [PoolId.parse(pool["name"]) for pool in self.pools]

    def tensors_of(self, pool_id: PoolId) -> Section:
        """Return the tensors of a pool."""
        return Section(self.section.file, pool_prefix(self.section.prefix, pool_id.name))

    def sequences(self, numbers: dict[PoolId, np.ndarray] | None = None) -> list[SequencePages]:
        """Return the distinct sequences, with page numbers of the file, or those `(n,)` of each pool in their place."""
        packed_pools = [pool_id for pool_id in self.pool_ids() if pool_id != PLAIN]
        counts, pages = self.section["page_counts"].numpy(), self.section["page_numbers"].numpy()
        require(bool((counts >= 0).all()) and counts.sum() == len(pages), f"{len(pages)} pages for {counts.sum()}")
        sequences = []
        parts = iter(np.split(pages, np.cumsum(counts.reshape(-1))[:-1]))
        for opened in self.section["open_pages"].numpy():
            window, full, *packed = (next(parts).copy() for _ in range(counts.shape[1]))
            packed_pages = {pool_id: pages for pool_id, pages in zip(packed_pools, packed, strict=True) if len(pages)}
            sequences.append(SequencePages(window.tolist(), opened.copy(), full, packed_pages))
        return sequences if numbers is None else [renumbered(sequence, numbers) for sequence in sequences]

    @property
    def rows(self) -> np.ndarray:
        """The sequence of each row, `(R,)`."""
        return self.section["rows"].numpy()

    @property
    def batch(self) -> int:
        """Sequences of the layer: rows, unless these are lanes."""
        return len(self.rows) // self.lanes

    def positions(self, windows: bool) -> list[np.ndarray]:
        """Return for each sequence the positions of its tokens in the window, or of those outside of it."""
        positions = {pool_id: self.tensors_of(pool_id)["positions"].numpy() for pool_id in self.pool_ids()}
        found = []
        for sequence in self.sequences():
            # The window's pages come first.
            inside = {pool_id: len(sequence.window) if pool_id == PLAIN else 0 for pool_id in positions}
            parts = {pool_id: slice(0, end) if windows else slice(end, None) for pool_id, end in inside.items()}
            slots = [known[sequence.pages(pool_id)[parts[pool_id]]] for pool_id, known in positions.items()]
            found.append(np.concatenate([each[each >= 0] for each in slots]))
        return found

    def windows(self) -> Iterator[list[torch.Tensor]]:
        """Yield for each sequence the positions `(n,)`, experts, keys and values `(n, H, D)` of its window's tokens."""
        for sequence in self.sequences():
            pages = torch.tensor(sequence.window, dtype=torch.int64)
            plain = self.tensors_of(PLAIN)
            positions, experts, keys, values = (plain[n][pages] for n in ("positions", "experts", "keys", "values"))
            filled = positions >= 0
            yield [positions[filled], experts[filled], keys.transpose(1, 2)[filled], values.transpose(1, 2)[filled]]

    def empty_pools(self, device: torch.device, tiers: LayerTiers | None = None, *, rotary_values: bool) -> LayerPools:
        """Return pools of no pages, with the saved codecs."""
        table, size = self.description, self.config.page_size
        plain = PlainPool(table["page_heads"], table["key_dim"], table["value_dim"], size, self.dtype, device)
        plain.rotary_values = rotary_values
        pools = LayerPools(plain, self.config, tiers)
        codecs = [self._codec(number, codec, device) for number, codec in enumerate(self._codecs)]
        for encoder, known in zip(pools.encoders.in_use, self._encoders, strict=False):
            encoder.codecs.update({name: codecs[number] for name, number in known.items()})
        for pool in self.pools:
            if PoolId.parse(pool["name"]) != PLAIN:
                made = pools.packed_pool(codecs[pool["key_codec"]], codecs[pool["value_codec"]])
                require(made.id.name == pool["name"], f"pool {pool['name']!r} has the codecs of {made.id.name!r}")
        return pools

    def _codec(self, number: int, saved: dict[str, Any], device: torch.device) -> Codec:
        basis = None
        if saved["has_basis"]:
            basis = self.section.file[basis_name(self.section.prefix, number)].to(device, copy=True)
        return Codec(saved["name"], KV.KEYS if saved["keys"] else KV.VALUES, saved["rank"], basis)


def renumbered(sequence: SequencePages, numbers: dict[PoolId, np.ndarray]) -> SequencePages:
    """Return a sequence with other page numbers, `(n,)` of each pool by those in the file."""
    plain = numbers[PLAIN]
    opened = np.array([plain[page] if page >= 0 else -1 for page in sequence.open], dtype=np.int64)
    packed = {pool_id: numbers[pool_id][pages] for pool_id, pages in sequence.packed.items()}
    return SequencePages([int(plain[page]) for page in sequence.window], opened, plain[sequence.full], packed)
