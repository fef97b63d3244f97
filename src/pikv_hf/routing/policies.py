"""Routing policies: which full pages a decoding step reads.

Each KV head of each row has a choice of its own among the full pages of the shards. Sinks, recent window and pages that
are not full are read in any case. A policy ranks pages by what is known of them without reading them, see
:class:`~pikv_hf.routing.routing_view.RoutingView`; to add one, subclass :class:`RoutingPolicy` and register it.

What became of the routers of the original (arXiv 2508.06526) is in `docs/routing.md`.
"""

import torch

from ..page_table.layer_pools import LayerPools
from .policy import POLICIES, RoutingPolicy
from .routing_view import RoutingView

__all__ = [
    "POLICIES",
    "AdaptiveRouting",
    "CacheAwareRouting",
    "ExpertTopkRouting",
    "HierarchicalRouting",
    "PageBoundRouting",
    "PageMassRouting",
]


@POLICIES.register("page_bound")
class PageBoundRouting(RoutingPolicy):
    """The pages whose keys could have the largest logits: Quest (Tang et al., arXiv 2406.10774)."""

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the pages' upper bounds."""
        return view.page_bounds()


@POLICIES.register("page_mass")
class PageMassRouting(RoutingPolicy):
    """The pages whose keys, known in 2 bits each, take the largest shares of the attention to all pages.

    A bound, a centroid or a radius says little of the one key in a page that a query looks up; its own code does.
    Shares are means over the query heads of a KV head. PQCache (arXiv 2407.12820) finds tokens by quantised keys too.
    """

    def prepare(self, pools: LayerPools) -> None:
        """Have the keys of pages kept in 2 bits."""
        pools.keep_codes()

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the logarithms of the pages' estimated shares."""
        return view.coded_masses()


@POLICIES.register("expert_topk")
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


@POLICIES.register("cache_aware")
class CacheAwareRouting(RoutingPolicy):
    """`page_bound`, less what it costs to reach a page: `tier_cost` logits for one in the slowest tier."""

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the pages' upper bounds minus their costs."""
        bounds, costs = view.page_bounds(), view.tier_costs()
        return bounds if costs is None else bounds - self.tier_cost * costs


@POLICIES.register("adaptive")
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


@POLICIES.register("hierarchical")
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
