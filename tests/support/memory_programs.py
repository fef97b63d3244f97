"""Random programs of what frees pages of a cache, and what a cache of the same tokens needs that is made afresh."""

import contextlib
import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from layer_machine import CODECS

from pikv_hf import PiKVCache
from pikv_hf.pages.pool_growth import MIN_GROWTH
from pikv_hf.tiers import page_file
from pikv_hf.tiers.file_records import HEADER_BYTES
from pikv_hf.tiers.host_memory import MIN_SLAB_ROWS

#: What a cache may hold for each byte that it would hold if it were made afresh.
MOST = 1.25

Step = tuple[str, float, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """Options of a cache, and what is done to it: names of methods of :class:`Run`, each with a share and a number."""

    options: dict[str, Any]
    steps: list[Step]


def programs() -> st.SearchStrategy[Program]:
    """Draw programs; every one begins with a prompt and ends with a few tokens."""
    step = st.tuples(st.sampled_from(OPERATIONS), st.floats(0, 1), st.integers(0, 9))
    return st.builds(Program, _options(), st.lists(step, min_size=1, max_size=7))


def _options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "codecs": st.sampled_from(CODECS),
            "page_size": st.sampled_from([4, 8]),
            "recent_window": st.sampled_from([0, 16]),
            "sink_tokens": st.sampled_from([0, 4]),
            "num_shards": st.sampled_from([1, 3]),
            "routing": st.sampled_from(["all", "page_bound"]),
            "budget": st.sampled_from([None, None, 150]),
            "tiers": st.sampled_from([None, None, {"cpu": "64KiB", "disk": None}, {"device": "64KiB", "cpu": None}]),
            "devices": st.sampled_from([None, None, ["cpu:0", "cpu:1"]]),
        }
    )


class Run:
    """A cache that a program is run on.

    Parameters
    ----------
    model : PreTrainedModel
        Small.
    options : dict
        As :func:`programs` draws them.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        codecs, devices = options["codecs"], options["devices"]
        given = {
            name: value for name, value in options.items() if name not in ("codecs", "devices") and value is not None
        }
        self.model, self.devices = model, devices
        self.cache = PiKVCache.for_model(
            model, key_codec=codecs[0], value_codec=codecs[1], rank=4, devices=devices, **given
        )
        self.forks: list[PiKVCache] = []
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def tokens(self, share: float, number: int) -> None:
        """Read a piece of text."""
        rows = self.cache.layers[0].batch or 2
        ids = torch.randint(2, 190, (rows, 1 + int(share * 60) + 20 * number), generator=self.generator)
        self.model(ids, past_key_values=self.cache)

    def steps(self, share: float, number: int) -> None:
        """Decode."""
        for _ in range(number):
            self.tokens(0, 0)

    def crop(self, share: float, number: int) -> None:
        # Which of the model's positions were assigned is not known: a length among them is refused.
        with contextlib.suppress(ValueError):
            self.cache.crop(1 + int(share * self.cache.get_seq_length()))

    def select(self, share: float, number: int) -> None:
        rows = self.cache.layers[0].batch
        kept = torch.randperm(rows, generator=self.generator)[: max(1, int(share * rows))]
        self.cache.batch_select_indices(kept)

    def repeat(self, share: float, number: int) -> None:
        if self.cache.layers[0].batch <= 4:
            self.cache.batch_repeat_interleave(2)

    def fork(self, share: float, number: int) -> None:
        """Go on with a fork; the older one stays for a while."""
        self.forks = [*self.forks[-1:], self.cache]
        self.cache = self.cache.fork()

    def drop_forks(self, share: float, number: int) -> None:
        self.forks = []
        gc.collect()

    def keep(self, share: float, number: int) -> None:
        """Keep some tokens, of all heads or of each its own."""
        for layer in self.cache.layers:
            shape = (layer.batch, 2 if number % 2 else 1, layer.seen)
            kept = torch.rand(shape, generator=self.generator) < 0.3 + 0.7 * share
            layer.keep(kept.expand(-1, 2, -1))

    def assign(self, share: float, number: int) -> None:
        """Assign some of the tokens from outside, as kvpress does."""
        for layer in self.cache.layers:
            length = 1 + int(share * (layer.seen - 1))
            keys, values = (each[:, :, :length].clone() for each in (layer.keys, layer.values))
            layer.keys, layer.values = keys, values

    def reset(self, share: float, number: int) -> None:
        self.cache.reset()
        self.tokens(share, number)

    def finish(self) -> None:
        """Let go of forks, and go on for a few steps, in which what they held comes back."""
        self.drop_forks(0, 0)
        self.steps(0, 3)

    def too_much(self) -> list[str]:
        """Return what the cache has too much of, against one that was saved and loaded."""
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(path := Path(folder) / "cache")
            fresh = PiKVCache.load(path, self.model, devices=self.devices)
        found = []
        if (used := self.cache.nbytes) > (most := MOST * fresh.nbytes + few_pages(self.cache)):
            found.append(f"{used} bytes, where a fresh cache has {fresh.nbytes}: more than {most:.0f}")
        if self.cache.tiers is not None and fresh.tiers is not None:
            ours, theirs = self.cache.tiers.bytes_used(), fresh.tiers.bytes_used()
            # Where a page lies differs: what is below fast memory may be in it too.
            below = sum(ours.values()) - next(iter(ours.values()))
            if below > (most := MOST * sum(theirs.values()) + few_pages(self.cache)):
                found.append(f"{ours} in tiers, where a fresh cache has {theirs}: more than {most:.0f} in slower ones")
        return found


def few_pages(cache: PiKVCache) -> int:
    """Return the bytes of the few free pages and rows that each pool may keep whatever its size, headers included."""
    most = 0
    for table in (table for layer in cache.layers for table in layer.store.tables()):
        for pool in table.pools.by_id().values():
            most += (MIN_GROWTH + 2 * len(table.rows)) * pool.full_page_bytes
            if table.pools.tiers is not None:
                most += MIN_SLAB_ROWS * pool.page_bytes + table.num_shards * 2 * HEADER_BYTES
    return most


OPERATIONS = [
    "tokens", "steps", "crop", "select", "repeat", "fork", "drop_forks", "keep", "assign", "reset",
]  # fmt: skip


def run(model: Any, program: Program) -> Run:
    """Run a program; files are shortened however small they are."""
    with mock.patch.object(page_file, "REWRITE_BYTES", 0):
        made = Run(model, program.options)
        made.tokens(1.0, 9)
        for name, share, number in program.steps:
            getattr(made, name)(share, number)
        made.finish()
    return made
