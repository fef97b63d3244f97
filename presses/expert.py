"""Eviction by the model's own router, with a control that does not listen to it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pikv_hf.presses.query_aware import QueryAwarePress
from pikv_hf.presses.routing import routing_of, watch_routers

#: Marks the layer whose routing of the same tokens a layer's press uses.
_BELOW = "_pikv_module_below"


@dataclass
class ExpertPress(QueryAwarePress):
    """Keeps the tokens of experts that attention looks at, where the router was sure of them.

    A token's worth from routing is its expert's importance, the mean attention mass of all tokens that went to the same
    expert (so that a heavily loaded expert does not win by its load), times the router's confidence. It is blended with
    the token's own mass. A layer's router runs after its attention, so the routing is that of the layer below; the
    first layer has none and goes by mass alone.

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
        modules = watch_routers(model)
        below: nn.Module | None = None
        for index in sorted(modules):
            # In a list, so that torch does not register one attention as part of the other.
            setattr(modules[index], _BELOW, [below])
            below = modules[index]

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
        mass = super().score(module, hidden_states, keys, values, attentions, kwargs)
        below = getattr(module, _BELOW, [None])[0]
        routing = None if below is None else routing_of(below)
        rows = None if routing is None else routing.rows(keys.shape[0], keys.shape[2])
        if routing is None or rows is None:
            return mass
        experts, confidence = (part.to(mass.device) for part in rows)
        if self.router == "random":
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(keys.shape[2], generator=generator).to(mass.device)
            experts, confidence = experts[:, order], confidence[:, order]
        recent = mass >= mass.amax()
        worth = expert_importance(mass.masked_fill(recent, 0), experts, routing.num_experts) * confidence[:, None]
        blended = mass.clamp_min(0) ** (1 - self.router_weight) * worth**self.router_weight
        return blended.masked_fill(recent, 2 * float(blended.max()) + 1)


def expert_importance(mass: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return for each token the mean mass of the tokens of its expert.

    Parameters
    ----------
    mass : torch.Tensor
        `(B, H, T)`.
    experts : torch.Tensor
        `(B, T)` int64.
    num_experts : int
        E.

    Returns
    -------
    torch.Tensor
        `(B, H, T)`.
    """
    index = experts[:, None].expand_as(mass)
    totals = mass.new_zeros((*mass.shape[:2], num_experts)).scatter_add_(-1, index, mass)
    loads = mass.new_zeros((*mass.shape[:2], num_experts)).scatter_add_(-1, index, torch.ones_like(mass))
    return (totals / loads.clamp_min(1)).gather(-1, index)
