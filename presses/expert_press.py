"""Eviction by the model's own router, with a control that does not listen to it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pikv_hf.presses.expert_routing import routing_below, watch_routers
from pikv_hf.presses.query_aware_press import QueryAwarePress


@dataclass
class ExpertPress(QueryAwarePress):
    """Keeps the tokens of experts that attention looks at, where the router was sure of them.

    A token's worth from routing is its expert's importance, the mean attention mass of the tokens that went to the same
    expert (so that a heavily loaded expert does not win by its load), times the router's confidence. The latest tokens,
    which come first anyway and which few queries see, do not count. The worth is blended with the token's own mass. A
    layer's router runs after its attention, so the routing is that of the layer below; where that has none, as below
    the first layer, mass alone decides.

    Parameters
    ----------
    router_weight : float
        Exponent of the worth from routing against the token's own mass, in [0, 1]: 1 is routing alone.
    router : {"model", "random"}
        `"random"` deals experts and confidences out anew among the tokens: the control. A press that is no better than
        it gains nothing from the router.
    seed : int
        Of the control.

    Raises
    ------
    ValueError
        For arguments out of range, and models without a router that can be read.
    """

    router_weight: float = 0.5
    router: Literal["model", "random"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.router_weight <= 1:
            raise ValueError(f"router_weight must be between 0 and 1, got {self.router_weight}")
        if self.router not in ("model", "random"):
            raise ValueError(f"router must be 'model' or 'random', got {self.router!r}")

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model, observe its queries and note what its routers choose."""
        super().post_init_from_model(model)
        watch_routers(model)

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return the blended worth of each token, `(B, H, T)`; the latest tokens have the highest."""
        stored = kwargs.get("pikv_stored")
        mass, recent = self.utility(module, keys, values, kwargs)
        routing = routing_below(module)
        rows = None if routing is None else routing.rows(keys.shape[0], keys.shape[2])
        if routing is None or rows is None:
            return self.ranked(mass, recent, stored)
        stored = torch.ones_like(mass, dtype=torch.bool) if stored is None else stored
        experts, confidence = (part.to(mass.device) for part in rows)
        if self.router == "random":
            order = dealt(stored.any(dim=1), self.seed)
            experts, confidence = experts.gather(1, order), confidence.gather(1, order)
        importance = expert_importance(mass, experts, routing.num_experts, stored & ~recent)
        worth = importance * confidence[:, None]
        blended = mass.clamp_min(0) ** (1 - self.router_weight) * worth**self.router_weight
        return self.ranked(blended, recent, stored)


def dealt(real: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a random order of each row's real tokens, `(B, T)` int64; the others stay where they are.

    `real` is `(B, T)` bool. A row's order depends on the seed and on how many tokens it has.
    """
    order = torch.arange(real.shape[1], device=real.device).repeat(len(real), 1)
    for row, mine in enumerate(real):
        columns = mine.nonzero().squeeze(1)
        permutation = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
        order[row, columns] = columns[permutation.to(columns.device)]
    return order


def expert_importance(
    mass: torch.Tensor, experts: torch.Tensor, num_experts: int, counted: torch.Tensor
) -> torch.Tensor:
    """Return for each token the mean mass of the tokens of its expert.

    Parameters
    ----------
    mass : torch.Tensor
        `(B, H, T)`.
    experts : torch.Tensor
        `(B, T)` int64.
    num_experts : int
        E.
    counted : torch.Tensor
        `(B, H, T)` bool, which tokens the mean is over; 0 for an expert that has none of them.

    Returns
    -------
    torch.Tensor
        `(B, H, T)`.
    """
    index, weight = experts[:, None].expand_as(mass), counted.to(mass)
    totals = mass.new_zeros((*mass.shape[:2], num_experts)).scatter_add_(-1, index, mass * weight)
    loads = mass.new_zeros((*mass.shape[:2], num_experts)).scatter_add_(-1, index, weight)
    return (totals / loads.clamp_min(1)).gather(-1, index)
