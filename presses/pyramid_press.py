"""PyramidKV: fewer tokens for later layers, and within a layer for shards that attention passes by."""

from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.integration.attachment import attachment_of
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.presses.base_press import LayerView
from pikv_hf.presses.expert_routing import routing_of, watch_routers
from pikv_hf.presses.joint_press import JointPress
from pikv_hf.presses.query_aware_press import QueryAwarePress
from pikv_hf.sharding.placement import expert_placement, hash_placement


@dataclass
class PyramidPress(JointPress, QueryAwarePress):
    """Budgets that fall from layer to layer as in PyramidKV (arXiv 2406.02069), and follow attention over shards.

    The layers' shares fall linearly, the last layer's being the first one's divided by `slope`, and are scaled so that
    together they are the budget. Within a layer each expert shard gets a share in proportion to the attention that
    its tokens got, blended with its number of tokens; where a layer has no router that was read, shards are by
    position. Tokens are scored as in :class:`QueryAwarePress`.

    Parameters
    ----------
    slope : float
        At least 1; 1 gives all layers the same.
    shard_weight : float
        How much a shard's budget follows its attention rather than its size, in [0, 1].
    headwise : bool
        Whether the heads of a layer share its budget, the better tokens of any head first, as in AdaKV
        (arXiv 2407.11550); each head keeps at least a fifth of its even share.

    Raises
    ------
    ValueError
        For arguments out of range.
    """

    slope: float = 3.0
    shard_weight: float = 0.5
    headwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slope < 1:
            raise ValueError(f"slope must be at least 1, got {self.slope}")
        if not 0 <= self.shard_weight <= 1:
            raise ValueError(f"shard_weight must be between 0 and 1, got {self.shard_weight}")

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model, observe its queries and, if it has any, what its routers choose."""
        super().post_init_from_model(model)
        attachment = attachment_of(model)
        if attachment is not None and attachment.expert_routers:
            watch_routers(model)

    @property
    def ragged(self) -> bool:
        """Whether layers keep different numbers of tokens."""
        return self.slope > 1

    def press_layers(self, views: list[LayerView]) -> None:
        """Divide the budget over layers, their shards and perhaps their heads."""
        # Of each layer, the shares of the rows.
        rows = [falling_shares(share, len(views), self.slope) for share in self.kept_shares(views[0])]
        for view, shares_of_rows in zip(views, zip(*rows, strict=True), strict=True):
            mass, recent = self.utility(view.module, view.keys, view.values, {"pikv_stored": view.stored})
            scores = self.guarded(self.ranked(mass, recent, view.stored), view.stored)
            budgets = list(map(self.kept_tokens, self.tokens_seen(view), shares_of_rows))
            if self.headwise:
                self.evict(view, self.best_of_heads(view, scores, budgets))
            else:
                self.evict(view, self.best_of_shards(view, scores, mass * ~recent, budgets))

    def best_of_shards(
        self, view: LayerView, scores: torch.Tensor, mass: torch.Tensor, budgets: list[int]
    ) -> torch.Tensor:
        """Return what to keep, `(B, H, T)` bool, each shard within its part of a row's budget in tokens per head."""
        shards, number = shards_of(view)
        kept = torch.zeros_like(view.stored)
        for row, budget in enumerate(budgets):
            attended = mass[row].where(view.stored[row], 0).sum(dim=0)
            mine = view.stored[row].any(dim=0)
            masses = torch.zeros(number, device=mass.device).index_add_(0, shards[row][mine], attended[mine])
            sizes = torch.bincount(shards[row][mine], minlength=number).float()
            parts = self.shard_weight * shares(masses) + (1 - self.shard_weight) * shares(sizes)
            kept[row] = self._fill(scores[row], view.stored[row], shards[row], parts, budget)
        return kept

    def _fill(
        self, scores: torch.Tensor, stored: torch.Tensor, shards: torch.Tensor, parts: torch.Tensor, budget: int
    ) -> torch.Tensor:
        """Keep the best of each shard up to its part; what a small shard leaves goes to the best of the others."""
        lifted = scores.clone()
        top = scores.masked_fill(~scores.isfinite(), 0).amax() + 1
        for shard, part in enumerate(parts.tolist()):
            mine = (shards == shard) & stored
            count = int(part * budget)
            if not count or not bool(mine.any()):
                continue
            order = scores.masked_fill(~mine, -torch.inf).topk(min(count, scores.shape[-1]), dim=-1).indices
            picked = torch.zeros_like(mine).scatter_(-1, order, True) & mine
            lifted = torch.where(picked & lifted.isfinite(), lifted + top, lifted)
        best = lifted.topk(min(budget, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(stored).scatter_(-1, best, True) & stored

    def best_of_heads(self, view: LayerView, scores: torch.Tensor, budgets: list[int]) -> torch.Tensor:
        """Return what to keep, `(B, H, T)` bool, the heads competing for a row's budget in tokens per head."""
        kept = torch.zeros_like(view.stored)
        for row, each in enumerate(budgets):
            safe = scores[row].topk(max(1, each // 5, min(self.sink_tokens, each)), dim=-1).indices
            lifted = scores[row].scatter(-1, safe, torch.inf).masked_fill(~view.stored[row], -torch.inf)
            best = lifted.flatten().topk(min(each * len(lifted), lifted.numel())).indices
            chosen = torch.zeros(lifted.numel(), dtype=torch.bool, device=lifted.device).scatter_(0, best, True)
            kept[row] = chosen.view_as(lifted) & view.stored[row]
        return kept


def falling_shares(share: float, layers: int, slope: float) -> list[float]:
    """Return shares that fall linearly by a factor of `slope`, with mean `share` and none above 1."""
    steps = torch.linspace(slope, 1.0, layers, dtype=torch.float64)
    wanted, given = share * layers, torch.zeros(layers, dtype=torch.float64)
    open_layers = torch.ones(layers, dtype=torch.bool)
    # What a layer cannot use goes to the others in proportion to theirs.
    while bool(open_layers.any()):
        rest = wanted - float(given[~open_layers].sum())
        given[open_layers] = steps[open_layers] * rest / float(steps[open_layers].sum())
        over = open_layers & (given > 1)
        if not bool(over.any()):
            break
        given[over] = 1.0
        open_layers &= ~over
    return given.tolist()


def shards_of(view: LayerView) -> tuple[torch.Tensor, int]:
    """Return the shard of each column, `(B, T)` int64, and the number of shards."""
    batch, _, tokens = view.stored.shape
    number = view.layer.config.num_shards if isinstance(view.layer, PiKVLayer) else 8
    first = view.stored.any(dim=1).int().argmax(dim=-1, keepdim=True)
    columns = (torch.arange(tokens, device=view.stored.device) - first).clamp_min(0)
    shards = hash_placement(32, number)(columns, columns)
    routing = routing_of(view.module)
    rows = None if routing is None else routing.rows(batch, tokens)
    if routing is not None and rows is not None:
        shards = expert_placement(routing.num_experts, number, view.index)(columns, rows[0].to(shards.device))
    return shards, number


def shares(amounts: torch.Tensor) -> torch.Tensor:
    """Return amounts divided by their sum; even shares if that is 0."""
    total = amounts.sum()
    return amounts / total if float(total) > 0 else torch.full_like(amounts, 1 / len(amounts))
