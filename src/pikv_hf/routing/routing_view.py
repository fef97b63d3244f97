"""Facts about pages that routing policies rank them by: bounds of logits, estimated attention, costs of tiers."""

import dataclasses
from math import log

import torch

from ..page_table.full_page_index import FullPageIndex
from ..pages.page_pool import PagePool
from ..tiers.tiered_pool import TieredPool

# A page's mass is estimated as if all of its logits were two standard deviations above their middle. Of keys that are
# spread evenly between their bounds in all D channels, one deviation is DEVIATION / sqrt(D) of the half-width between
# the bounds of logits: (1 / 3) ** 0.5 of a channel's, over (2 / pi) ** 0.5 for the mean size of a query's channel.
DEVIATIONS, DEVIATION = 2.0, 0.7236


@dataclasses.dataclass(slots=True)
class RoutingView:
    """One step of one layer as a routing policy sees it: its queries, and the index of the pages to choose among.

    Attributes
    ----------
    query : torch.Tensor
        `(B, Hq, D)`, the queries of the step.
    scale : float
        Factor on their logits.
    index : FullPageIndex
        The n columns to choose among.
    protected : torch.Tensor or None
        `(B, n)` bool, pages that hold sinks or recent tokens and are read in any case.
    """

    query: torch.Tensor
    scale: float
    index: FullPageIndex
    protected: torch.Tensor | None = None

    def page_bounds(self) -> torch.Tensor:
        """Return upper bounds of the logits of each page, `(H, B, n)` float32, `-inf` where unused."""
        return self.index.bounds(self.query) * self.scale

    def page_masses(self) -> torch.Tensor:
        """Return the logarithm of the share of each page in the attention to all pages that are not read in any case.

        A bound is the logit of the best key that could be there, which no page has: the page with the loosest bound
        wins. This estimates what keys between the bounds have. And each query head has its own softmax, so that one
        with large logits does not decide for all.

        Returns
        -------
        torch.Tensor
            `(H, B, n)` float32, `-inf` where unused and where a page is protected.
        """
        middle, half = self.index.ranges(self.query)
        return self._shares((middle + half * (DEVIATIONS * DEVIATION * self.query.shape[2] ** -0.5)) * self.scale)

    def coded_masses(self) -> torch.Tensor:
        """Return what :meth:`page_masses` estimates, from the 2-bit codes of every key of a page, `(H, B, n)`."""
        return self._shares(self.index.masses(self.query, self.scale))

    def _shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logarithms of shares, means over query heads, of pages with logits `(H, G, B, n)`."""
        hidden = ~self.index.valid if self.protected is None else ~self.index.valid | self.protected
        shares = logits.masked_fill_(hidden, -torch.inf).log_softmax(dim=3).logsumexp(dim=1) - log(logits.shape[1])
        # A row with nothing to choose from has no shares.
        return shares.masked_fill_(hidden, -torch.inf)

    def _folded(self, heads: int) -> torch.Tensor:
        batch, query_heads, dim = self.query.shape
        return self.query.reshape(batch, heads, query_heads // heads, dim).transpose(0, 1).float()

    def shard_bounds(self) -> torch.Tensor:
        """Return upper bounds of the logits of each shard, `(H, B, S)` float32, `-inf` where it has no page."""
        ends = self.index.shard_ends()
        least, most, _ = ends.chunk(3, dim=3)
        empty = (most < least).any(dim=3)
        query = self._folded(len(ends))
        least, most = least.nan_to_num(0, 0, 0), most.nan_to_num(0, 0, 0)
        bounds = query.clamp_min(0) @ most.transpose(2, 3) + query.clamp_max(0) @ least.transpose(2, 3)
        return (bounds.amax(dim=2) * self.scale).masked_fill_(empty, -torch.inf)

    def shard_centroids(self) -> torch.Tensor:
        """Return the logits of each shard's centroid, the mean of the middles of its pages, `(H, B, S)` float32."""
        ends = self.index.shard_ends()
        least, most, middle = ends.chunk(3, dim=3)
        logits = (self._folded(len(ends)) @ middle.transpose(2, 3)).amax(dim=2) * self.scale
        return logits.masked_fill_((most < least).any(dim=3), -torch.inf)

    def of_shards(self, figures: torch.Tensor) -> torch.Tensor:
        """Return the figures `(H, B, S)` of shards for the pages in them, `(H, B, n)`, `-inf` where unused."""
        index = self.index.shards.clamp_min(0).expand(len(figures), -1, -1)
        return figures.gather(2, index).masked_fill_(~self.index.valid, -torch.inf)

    def tier_costs(self) -> torch.Tensor | None:
        """Return how slow each page is to reach, `(B, n)` from 0 (in fast memory) to 1; None if all are 0."""
        costs = [tier_costs_of(pool) for pool in self.index.pools.values()]
        if all(cost is None for cost in costs):
            return None
        of_pages = self.index.pages.new_zeros(self.index.pages.shape, dtype=torch.float32)
        for (_, part), cost in zip(self.index.columns.items(), costs, strict=True):
            if cost is not None:
                of_pages[:, part] = cost[self.index.pages[:, part]]
        return of_pages


def tier_costs_of(pool: PagePool) -> torch.Tensor | None:
    """Return how slow each page of a pool is to reach, `(N,)` from 0 to 1; None if all are in fast memory."""
    return pool.tier_costs() if isinstance(pool, TieredPool) else None
