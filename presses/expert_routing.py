"""What the model's routers said about the tokens that a press is to judge."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pikv_hf.allocation.observed_queries import Observer
from pikv_hf.common.foreign_attributes import ROUTING_ATTRIBUTE, ROUTING_BELOW_ATTRIBUTE
from pikv_hf.integration.attachment import ensure_attached
from pikv_hf.integration.expert_router import Lazy


@dataclass(slots=True)
class Routing:
    """Choices of one layer's router, for the tokens of a prompt.

    Attributes
    ----------
    num_experts : int
        E.
    observer : Observer
        Of the same layer's attention, which runs before the router: it knows the shape of the call.
    experts : torch.Tensor or None
        `(B, T)` int64 primary experts of the tokens read so far.
    confidence : torch.Tensor or None
        `(B, T)` float32, the share of the routing weight that the primary expert got.
    call : int
        Which call of the attention they are of.
    handle : Any
        Of the hook.
    """

    num_experts: int
    observer: Observer
    experts: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    call: int = 0
    handle: Any = None

    def note(self, experts: Lazy, confidence: Lazy) -> None:
        """Take the choices of a call; single tokens, which are decoding, are of no interest to a press."""
        batch, new = self.observer.batch, self.observer.new
        if new == 1:
            return
        self.call = self.observer.calls
        chosen, sure = experts(), confidence()
        if chosen.numel() != batch * new:
            self.experts = self.confidence = None
            return
        chosen, sure = chosen.view(batch, new), sure.view(batch, new)
        if self.observer.seen == new or self.experts is None or self.confidence is None:
            self.experts, self.confidence = chosen, sure
        else:
            self.experts = torch.cat([self.experts, chosen], dim=1)
            self.confidence = torch.cat([self.confidence, sure], dim=1)

    def rows(self, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return experts and confidence `(B, T)`, None if they are not known of just these tokens.

        A router runs after its layer's attention: until then what is known is of another call.
        """
        if self.call != self.observer.calls or self.experts is None or self.confidence is None:
            return None
        if self.experts.shape != (batch, tokens):
            return None
        return self.experts, self.confidence


def watch_routers(model: Any) -> dict[int, nn.Module]:
    """Note what the model's routers choose from now on; a second call changes nothing.

    Returns
    -------
    dict
        The attention modules by layer index.

    Raises
    ------
    ValueError
        If the model has no router that can be read.
    """
    attachment = ensure_attached(model, "hash")
    attachment.require_expert_routers(model)
    modules = attachment.attention_modules()
    for index, router in attachment.expert_routers.items():
        if not hasattr(modules[index], ROUTING_ATTRIBUTE):
            routing = Routing(router.num_experts, Observer.of(modules[index]))
            routing.handle = router.watch(routing.note)
            setattr(modules[index], ROUTING_ATTRIBUTE, routing)
    below: Routing | None = None
    for index in sorted(modules):
        setattr(modules[index], ROUTING_BELOW_ATTRIBUTE, below)
        below = routing_of(modules[index])
    return modules


def unwatch_routers(modules: dict[int, nn.Module]) -> None:
    """Undo :func:`watch_routers`."""
    for module in modules.values():
        if (routing := routing_of(module)) is not None:
            routing.handle.remove()
            delattr(module, ROUTING_ATTRIBUTE)
        if hasattr(module, ROUTING_BELOW_ATTRIBUTE):
            delattr(module, ROUTING_BELOW_ATTRIBUTE)


def routing_of(module: nn.Module) -> Routing | None:
    """Return the routing of an attention module's layer, None if the layer has no router."""
    return getattr(module, ROUTING_ATTRIBUTE, None)


def routing_below(module: nn.Module) -> Routing | None:
    """Return the routing of the layer below an attention module's, whose router has run when this attention ends."""
    return getattr(module, ROUTING_BELOW_ATTRIBUTE, None)


def is_routed(modules: dict[int, nn.Module]) -> bool:
    """Return whether the routing of any of these layers is noted."""
    return any(routing_of(module) is not None for module in modules.values())
