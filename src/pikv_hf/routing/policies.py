"""Routing: which full pages a decoding step reads.

Each KV head of each row has a choice of its own among the full pages of the shards. Sinks, recent window and pages that
are not full are read in any case. A policy ranks pages by what is known of them without reading them, see
:class:`~pikv_hf.routing.routing_view.RoutingView`; to add one, subclass :class:`RoutingPolicy` and register it.

What became of the routers of the original (arXiv 2508.06526) is in `docs/routing.md`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import ceil
from typing import ClassVar, TypeVar

import torch

from ..config import PiKVConfig
from ..page_table.full_page_index import FullPageIndex
from .routing_view import RoutingView


@dataclasses.dataclass(slots=True)
class Choice:
    """The pages that a step reads.

    Attributes
    ----------
    columns : torch.Tensor
        `(H, B, k)` int64 columns of the index.
    taken : torch.Tensor or None
        `(H, B, k)` bool, which of them count; None if all do.
    """

    columns: torch.Tensor
    taken: torch.Tensor | None


class RoutingPolicy(ABC):
    """Chooses pages by rank.

    Parameters
    ----------
    config : PiKVConfig
        Its options.

    Attributes
    ----------
    name : str
        Its name in :class:`~pikv_hf.PiKVConfig`.
    stops_early : bool
        Whether :meth:`enough` may say that fewer pages do.
    leaves_out : bool
        Whether some pages rank `-inf`.
    """

    name: ClassVar[str]
    stops_early: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = False

    def __init__(self, config: PiKVConfig) -> None:
        self.max_pages = config.max_pages
        self.coverage = config.coverage
        self.tier_cost = config.tier_cost

    @abstractmethod
    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return `(H, B, n)` float32: the pages with the highest are read, those with `-inf` never."""

    def enough(self, view: RoutingView, ranks: torch.Tensor) -> torch.Tensor | None:
        """Return how many pages are enough, `(H, B)` int64, or None: as many as allowed.

        `ranks` `(H, B, k)` are those of the pages that may be read, highest first.
        """
        return None

    def most(self, held: torch.Tensor) -> torch.Tensor:
        """Return how many of `held` `(B,)` pages each row may read, int64."""
        if isinstance(self.max_pages, int):
            return held.clamp_max(self.max_pages)
        return (held.double() * self.max_pages).ceil().long()

    def choose(self, view: RoutingView) -> Choice | None:
        """Choose pages for a step; None if all are to be read."""
        index = view.index
        if not index.width:
            return None
        width = min(
            index.width, self.max_pages if isinstance(self.max_pages, int) else ceil(index.width * self.max_pages)
        )
        if width >= index.width and not self.stops_early:
            return None
        ranks = self.rank(view)
        if view.protected is None and index.fewest == index.width and not (self.stops_early or self.leaves_out):
            # Rows alike: each reads its best.
            return Choice(ranks.topk(width, dim=2).indices, None)
        held = index.valid.sum(dim=1)
        most = self.most(held)
        if view.protected is not None:
            # These come first, beyond what a step may read of the others.
            ranks.masked_fill_(view.protected, torch.inf)
            extra = view.protected.sum(dim=1)
            most, width = self.most(held - extra) + extra, min(index.width, width + int(extra.max()))
        best, columns = ranks.topk(width, dim=2)
        limit = most.expand(len(best), -1)
        if (enough := self.enough(view, best)) is not None:
            limit = torch.minimum(limit, enough)
        taken = best > -torch.inf
        taken &= torch.arange(width, device=best.device) < limit[:, :, None]
        if taken.device.type == "cpu":
            # On a GPU the kernel stops where nothing more counts, and asking here would wait for it.
            width = int(taken.sum(dim=2).max())
        return Choice(columns[..., :width], taken[..., :width])


_POLICIES: dict[str, type[RoutingPolicy]] = {}
_Policy = TypeVar("_Policy", bound=type[RoutingPolicy])


def register_routing(name: str) -> Callable[[_Policy], _Policy]:
    """Let `PiKVConfig(routing=name)` mean the decorated policy."""

    def named(policy: _Policy) -> _Policy:
        policy.name = name
        _POLICIES[name] = policy
        return policy

    return named


def make_routing(config: PiKVConfig) -> RoutingPolicy | None:
    """Return the policy that a configuration names, None for `"all"`."""
    return None if config.routing == "all" else _POLICIES[config.routing](config)


@dataclasses.dataclass(slots=True)
class ReadCounts:
    """What routed steps have read.

    Attributes
    ----------
    steps : int
        Steps.
    held : int
        Pages in reach, over steps, rows and KV heads.
    read : int or torch.Tensor
        Those that were read, with those that always are; on the device until somebody asks.
    """

    steps: int = 0
    held: int = 0
    read: int | torch.Tensor = 0

    def add(self, index: FullPageIndex, choice: Choice | None, always: int, heads: int) -> None:
        """Count a step in which rows have `always` pages that are read in any case."""
        self.steps += 1
        self.held += (index.held + always) * heads
        if choice is None:
            self.read = self.read + (index.held + always) * heads
        else:
            chosen = choice.columns.numel() if choice.taken is None else choice.taken.sum()
            self.read = self.read + chosen + always * heads


@dataclasses.dataclass(slots=True)
class PageRouter:
    """Routes the decoding steps of one layer.

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


@register_routing("page_bound")
class PageBoundRouting(RoutingPolicy):
    """The pages whose keys could have the largest logits: Quest (Tang et al., arXiv 2406.10774)."""

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the pages' upper bounds."""
        return view.page_bounds()


@register_routing("expert_topk")
class ExpertTopkRouting(RoutingPolicy):
    """The shards whose centroids are nearest to the query, whole, the newest pages of the last one.

    With expert placement a shard is a group of experts, so that this is routing by experts: PiKV's top-k router with
    the model's own clusters in place of an untrained network. It costs one product per shard, not per page.
    """

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the order of the pages' shards, and within a shard that of their newest tokens."""
        order = view.shard_centroids().argsort(dim=2).argsort(dim=2).float()
        newest = view.index.newest
        # Below 1, and exact for the order of positions up to 2**22 in each of few shards.
        return view.of_shards(order) + newest / (newest.amax() + 1)


@register_routing("cache_aware")
class CacheAwareRouting(RoutingPolicy):
    """`page_bound`, less what it costs to reach a page: `tier_cost` logits for one in the slowest tier."""

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the pages' upper bounds minus their costs."""
        bounds, costs = view.page_bounds(), view.tier_costs()
        return bounds if costs is None else bounds - self.tier_cost * costs


@register_routing("adaptive")
class AdaptiveRouting(RoutingPolicy):
    """The pages with the largest estimated masses, as many as cover a share of the attention.

    At most `max_pages`, at least a quarter of these. What is covered is a share of the attention to all pages that may
    be chosen, estimated by :meth:`~pikv_hf.routing.routing_view.RoutingView.page_masses`; what is read in any case
    comes on top. What they cover in fact was within 3 points of the share asked for (`eval/results/routing.json`). The
    idea of a mass to cover instead of a fixed number is Twilight's (arXiv 2502.02770).
    """

    stops_early = True

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the logarithms of the pages' estimated shares."""
        return view.page_masses()

    def enough(self, view: RoutingView, ranks: torch.Tensor) -> torch.Tensor | None:
        """Return the fewest pages whose shares add up to `coverage`, but not too few."""
        if self.coverage == 1:
            # The last shares vanish when they are added up.
            return None
        extra = 0 if view.protected is None else view.protected.sum(dim=1)
        # Heads that look at few tokens are those whose pages must not be missed, and an estimate may rank such a page
        # some places too low (`eval/results/routing.json` has what it costs to do without this).
        least = -(-self.most(view.index.valid.sum(dim=1) - extra) // 4) + extra
        return torch.maximum(self.covering(ranks), least)

    def covering(self, ranks: torch.Tensor) -> torch.Tensor:
        """Return the fewest pages whose estimated shares add up to `coverage`, `(H, B)` int64."""
        # Pages that are read in any case come first and cover nothing of this.
        shares = ranks.exp().masked_fill_(ranks == torch.inf, 0)
        return (shares.cumsum(dim=2) < self.coverage).sum(dim=2) + 1


@register_routing("hierarchical")
class HierarchicalRouting(RoutingPolicy):
    """First the better half of the shards by their bounds, then the pages with the highest bounds in these."""

    leaves_out = True

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the pages' upper bounds, `-inf` in the shards left out."""
        bounds = view.shard_bounds()
        kept = -(-(bounds > -torch.inf).sum(dim=2, keepdim=True) // 2)
        order = bounds.argsort(dim=2, descending=True).argsort(dim=2)
        inside = view.of_shards(bounds.masked_fill(order >= kept, -torch.inf)) > -torch.inf
        return view.page_bounds().masked_fill_(~inside, -torch.inf)
