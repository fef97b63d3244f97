"""Reading a model's own routers: which expert each token went to first."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Names under which the routed `*Experts` modules of transformers take their expert ids and weights.
_ID_ARGUMENTS = ("top_k_index", "router_indices", "selected_experts")
_WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights")
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")

# Receives the `(T,)` int64 primary experts of the tokens of one call.
Deliver = Callable[[torch.Tensor], None]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRouter:
    """Where a decoder layer's routing can be read.

    Attributes
    ----------
    module : nn.Module
        The module to hook: the experts, which are called with the chosen ids, or the router, which returns them.
    num_experts : int
        Experts to choose from.
    reads_inputs : bool
        Whether the ids are among the module's arguments rather than its outputs.
    """

    module: nn.Module
    num_experts: int
    reads_inputs: bool

    def listen(self, deliver: Deliver) -> torch.utils.hooks.RemovableHandle:
        """Call `deliver` with the primary experts of every forward pass; the handle ends it."""
        if self.reads_inputs:
            names = list(inspect.signature(self.module.forward).parameters)
            ids, weights = _named(names, _ID_ARGUMENTS), _named(names, _WEIGHT_ARGUMENTS)

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                deliver(primary_experts(given[ids], given.get(weights)))

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            deliver(experts_from_output(output, self.num_experts))

        return self.module.register_forward_hook(after)


def primary_experts(ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return each token's expert of the largest routing weight.

    Parameters
    ----------
    ids : torch.Tensor
        `(T, k)` integers, in any order.
    weights : torch.Tensor, optional
        `(T, k)`, or `(T, E)` over all experts; without it the first id counts.

    Returns
    -------
    torch.Tensor
        `(T,)` int64.
    """
    ids = ids.reshape(-1, ids.shape[-1]).long()
    if weights is None:
        return ids[:, 0]
    weights = weights.reshape(ids.shape[0], -1)
    if weights.shape != ids.shape:
        weights = weights.gather(1, ids)
    return ids.gather(1, weights.argmax(dim=1, keepdim=True)).squeeze(1)


def experts_from_output(output: Any, num_experts: int) -> torch.Tensor:
    """Return the primary experts from what a router returned: the arg max of the logits over all experts.

    Parameters
    ----------
    output : tensor or tuple
        Holds a float tensor whose last size is `num_experts`: logits or probabilities.
    num_experts : int
        E.

    Returns
    -------
    torch.Tensor
        `(T,)` int64.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    scores = [p for p in parts if torch.is_tensor(p) and p.is_floating_point() and p.shape[-1:] == (num_experts,)]
    if not scores:
        shapes = [tuple(part.shape) if torch.is_tensor(part) else type(part).__name__ for part in parts]
        raise RuntimeError(f"no router output has a last size of {num_experts} experts, got {shapes}")
    # Logits come last where a router returns both (Llama-4's scores are zero outside of the top k).
    return scores[-1].reshape(-1, num_experts).argmax(dim=-1)


def find_router(layer: nn.Module, attention: nn.Module, config: Any) -> LayerRouter | None:
    """Find the feed-forward routing of a decoder layer, or None if it has none.

    Parameters
    ----------
    layer : nn.Module
        The decoder layer.
    attention : nn.Module
        Its attention, which is left out: JetMoE routes attention heads as well.
    config : PreTrainedConfig
        The text model's config, asked for the number of experts where the modules do not tell.
    """
    modules = list(_outside(layer, attention))
    for module in modules:
        parameters = inspect.signature(module.forward).parameters
        if any(name in parameters for name in _ID_ARGUMENTS):
            count = _num_experts(module, config)
            return None if count is None else LayerRouter(module, count, reads_inputs=True)
    for module in modules:
        name = type(module).__name__
        if any(word in name for word in ("Router", "Gating", "TopKGate")):
            count = _num_experts(module, config)
            return None if count is None else LayerRouter(module, count, reads_inputs=False)
    return None


def _outside(layer: nn.Module, attention: nn.Module) -> Iterator[nn.Module]:
    skipped = set(attention.modules())
    return (module for module in layer.modules() if module is not layer and module not in skipped)


def _num_experts(module: nn.Module, config: Any) -> int | None:
    for source in (module, config, getattr(config, "ffn_config", None)):
        for name in _COUNT_ATTRIBUTES:
            if isinstance(count := getattr(source, name, None), int):
                return count
    return None


def _named(names: list[str], wanted: tuple[str, ...]) -> str:
    return next((name for name in wanted if name in names), "")
