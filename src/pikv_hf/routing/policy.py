"""The base class of routing policies: a policy ranks full pages, and a decoding step reads the highest."""

import dataclasses
from abc import ABC, abstractmethod
from math import ceil
from typing import ClassVar

import torch

from ..common.registry import Registry
from ..config import ROUTINGS, PiKVConfig
from ..page_table.layer_pools import LayerPools
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
    """Ranks pages; a step reads those with the highest ranks.

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

    def prepare(self, pools: LayerPools) -> None:
        """Have the pools of a layer keep what ranking pages needs of them."""
        pools.keep_bounds()

    @abstractmethod
    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return `(H, B, n)` float32: the pages with the highest are read, those with `-inf` never."""

    def enough(self, view: RoutingView, ranks: torch.Tensor) -> torch.Tensor | None:
        """Return how many pages are enough, `(H, B)` int64, or None: as many as allowed.

        `ranks` `(H, B, k)` are those of the pages that may be read, highest first.
        """
        return None

    def most(self, pages: torch.Tensor) -> torch.Tensor:
        """Return how many of `pages` `(B,)` each row may read, int64."""
        if isinstance(self.max_pages, int):
            return pages.clamp_max(self.max_pages)
        return (pages.double() * self.max_pages).ceil().long()

    def choose(self, view: RoutingView) -> Choice | None:
        """Choose pages for a step; None if all are to be read."""
        index = view.index
        most = self.max_pages if isinstance(self.max_pages, int) else ceil(index.width * self.max_pages)
        width = min(index.width, most)
        if not index.width or (width == index.width and not self.stops_early):
            return None
        ranks = self.rank(view)
        if view.protected is None and index.fewest == index.width and not (self.stops_early or self.leaves_out):
            # Rows alike: each reads its best.
            return Choice(ranks.topk(width, dim=2).indices, None)
        return self._choose_unlike(view, ranks, width)

    def _choose_unlike(self, view: RoutingView, ranks: torch.Tensor, width: int) -> Choice:
        """Choose at most `width` pages by their ranks where lanes may read more or fewer than others."""
        index = view.index
        pages = index.valid.sum(dim=1)
        most = self.most(pages)
        if view.protected is not None:
            # These come first, beyond what a step may read of the others.
            ranks.masked_fill_(view.protected, torch.inf)
            extra = view.protected.sum(dim=1)
            most, width = self.most(pages - extra) + extra, min(index.width, width + int(extra.max()))
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


#: The policies by name, each registered where it is defined.
POLICIES: Registry[RoutingPolicy] = Registry("routing", ROUTINGS)
