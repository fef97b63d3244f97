"""Random programs of public calls on a cache whose layers decide together: the budget holds after each call.

What fails for want of room says so, and the cache goes on where it was.
"""

import dataclasses
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from budget_runs import check, make_cache, paged_layers, shared_model
from hypothesis import strategies as st

from pikv_hf import PiKVCache
from pikv_hf.scheduling.growth_limit import BudgetError

#: What a program does, each with a number that says how much or which.
OPERATIONS = ("chunk", "chunk", "few", "decode", "decode", "crop", "select", "repeat", "fork", "save", "interrupt")


class InterruptedError(Exception):
    """Ends a call in the middle of the model, as Ctrl-C does."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A cache's options, the rows and the length of its prompt, and what happens then.

    To look at what the budget holds settles what waits: where `looks` is not set that is left to what comes next.
    """

    options: dict[str, Any]
    rows: int
    prompt: int
    padded: bool
    steps: tuple[tuple[str, int], ...]
    looks: bool = True


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program."""
    options: dict[str, Any] = {
        "budget": draw(st.one_of(st.sampled_from([56, 100, 0.25, 0.5]), st.integers(70, 200).map("{}KB".format))),
        "page_size": draw(st.sampled_from([4, 8])),
        "recent_window": draw(st.sampled_from([0, 16])),
        "sink_tokens": draw(st.sampled_from([0, 4])),
        "num_shards": draw(st.sampled_from([1, 3])),
        "budget_scope": draw(st.sampled_from([None, None, "layer"])),
    }
    routing = draw(st.sampled_from([None, None, "page_bound", "page_mass"]))
    options |= {} if routing is None else {"routing": routing, "max_pages": 3}
    rows, prompt = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 60, 150, 200]))
    steps = draw(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 120)), min_size=2, max_size=7))
    return Program(options, rows, prompt, draw(st.booleans()), tuple(steps), draw(st.booleans()))


class Run:
    """Runs a program, on a model of two layers."""

    def __init__(self, program: Program) -> None:
        self.model, self.program = shared_model(), program
        self.generator = torch.Generator().manual_seed(0)
        self.cache = make_cache(self.model, **program.options)
        assert all(layer.decides_jointly for layer in paged_layers(self.cache))
        self.mask = torch.zeros(program.rows, 0, dtype=torch.long)

    def run(self) -> None:
        """Run all of it; a step for which there is no room is left out."""
        steps = [("prompt", self.program.prompt), *self.program.steps]
        for name, amount in steps:
            mask, length = self.mask, self.mask.shape[1]
            try:
                getattr(self, name)(amount)
            except BudgetError:
                assert isinstance(self.program.options["budget"], str), "a budget in tokens can always be kept"
                if not length:
                    return
                # The call's own tokens, as far as there are any, go again.
                self.mask = mask
                self.cache.crop(length)
            if self.program.looks:
                self.holds()
        self.holds()

    def holds(self) -> None:
        """The budget does, every layer has the same length, and nothing is left of the last call."""
        lengths = {layer.state.positions_seen for layer in paged_layers(self.cache)}
        assert lengths == {self.mask.shape[1]}
        gc.collect()
        if self.mask.shape[1]:
            check(self.cache)
        assert all(layer.edits.joint._call.at < 0 for layer in paged_layers(self.cache))

    @torch.no_grad()
    def read(self, cache: PiKVCache, tokens: int, new: torch.Tensor | None = None) -> torch.Tensor:
        """Read random tokens; returns the mask with them."""
        rows = len(self.mask)
        ids = torch.randint(2, 190, (rows, tokens), generator=self.generator)
        mask = torch.cat([self.mask, torch.ones_like(ids) if new is None else new], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        logits = self.model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
        assert bool(logits[mask[:, -tokens:].bool()].isfinite().all())
        return mask

    def prompt(self, tokens: int) -> None:
        new = torch.ones(len(self.mask), tokens, dtype=torch.long)
        if self.program.padded and len(new) > 1:
            new[0, : tokens // 3] = 0
        self.mask = self.read(self.cache, tokens, new)

    def chunk(self, amount: int) -> None:
        self.mask = self.read(self.cache, 2 + amount)

    def few(self, amount: int) -> None:
        self.mask = self.read(self.cache, 2 + amount % 4)

    def decode(self, amount: int) -> None:
        for _ in range(1 + amount % 30):
            self.mask = self.read(self.cache, 1)
            if self.program.looks:
                check(self.cache)

    def crop(self, amount: int) -> None:
        length = max(1, self.mask.shape[1] * amount // 120)
        # Padding of a row may be all that is left of it.
        length = max(length, int((self.mask == 0).sum(dim=1).max()) + 1)
        self.cache.crop(length)
        self.mask = self.mask[:, :length]

    def select(self, amount: int) -> None:
        indices = torch.tensor([(amount + 7 * step) % len(self.mask) for step in range(1 + amount % 3)])
        self.cache.batch_select_indices(indices)
        self.mask = self.mask[indices]

    def repeat(self, amount: int) -> None:
        if len(self.mask) == 1:
            self.cache.batch_repeat_interleave(1 + amount % 2)
            self.mask = self.mask.repeat_interleave(1 + amount % 2, dim=0)

    def fork(self, amount: int) -> None:
        fork = self.unrefused(self.cache.fork)
        self.read(fork, amount)
        check(fork, forks=2)

    def save(self, amount: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            self.cache = self.unrefused(lambda: PiKVCache.load(Path(folder) / "cache", self.model))

    def unrefused(self, work: Callable[[], PiKVCache]) -> PiKVCache:
        """What is held already has room as it is."""
        try:
            return work()
        except BudgetError as error:
            raise AssertionError("a budget that holds a cache refuses the same once more") from error

    def interrupt(self, amount: int) -> None:
        """A call ends before, in or behind the attention of a layer; what it brought is cropped or goes on."""
        layer = self.model.model.layers[amount % 2]
        module = [layer.self_attn, layer.self_attn.o_proj, layer.mlp][amount % 3]

        def end(*_: Any) -> None:
            raise InterruptedError

        length, handle = self.mask.shape[1], module.register_forward_pre_hook(end)
        try:
            self.read(self.cache, amount)
        except InterruptedError:
            pass
        finally:
            handle.remove()
        self.cache.crop(length)
