"""Routing the decoding steps of a layer: which full pages each KV head reads, and how many that were."""

import dataclasses

import torch

from ..config import PiKVConfig
from ..page_table.full_page_index import FullPageIndex
from .policies import POLICIES
from .policy import Choice, RoutingPolicy
from .routing_view import RoutingView


def make_routing(config: PiKVConfig) -> RoutingPolicy | None:
    """Return the policy that a configuration names, None for `"all"`."""
    return None if config.routing == "all" else POLICIES[config.routing](config)


@dataclasses.dataclass(slots=True)
class ReadCounts:
    """How many pages routed steps have read, of how many.

    Attributes
    ----------
    steps : int
        Steps.
    reachable : int
        Full pages and those always read, over steps, rows and KV heads.
    read : int or torch.Tensor
        Those that were read, with those that always are; on the device until somebody asks.
    """

    steps: int = 0
    reachable: int = 0
    read: int | torch.Tensor = 0

    def add(self, index: FullPageIndex, choice: Choice | None, always: int, heads: int) -> None:
        """Count a step in which rows have `always` pages that are read in any case."""
        self.steps += 1
        every = (index.page_count + always) * heads
        self.reachable += every
        if choice is None:
            self.read = self.read + every
        else:
            chosen = choice.columns.numel() if choice.taken is None else choice.taken.sum()
            self.read = self.read + chosen + always * heads


@dataclasses.dataclass(slots=True)
class PageRouter:
    """Chooses the full pages that the decoding steps of one layer read, and counts them.

    Attributes
    ----------
    policy : RoutingPolicy
        What chooses.
    sink_tokens, recent_window : int
        As in :class:`~pikv_hf.PiKVConfig`.
    counts : ReadCounts
        What the steps have read.
    """

    policy: RoutingPolicy
    sink_tokens: int
    recent_window: int
    counts: ReadCounts = dataclasses.field(default_factory=ReadCounts)

    def choose(self, index: FullPageIndex, query: torch.Tensor, scale: float, seen: int) -> Choice | None:
        """Choose pages for the queries `(B, Hq, D)` of a step; None if all full pages are to be read.

        `seen` are the positions up to and including that of the queries.
        """
        recent = max(0, seen - self.recent_window)
        protected = None
        if index.first < self.sink_tokens or index.last >= recent:
            # Such pages are in the window, unless a press has rebuilt the table or the newest tokens were cropped.
            protected = index.valid & ((index.oldest < self.sink_tokens) | (index.newest >= recent))
        return self.policy.choose(RoutingView(query, scale, index, protected))


def make_page_router(config: PiKVConfig) -> PageRouter | None:
    """Return the page router that a configuration asks for, None if steps read all pages."""
    policy = make_routing(config)
    return None if policy is None else PageRouter(policy, config.sink_tokens, config.recent_window)
