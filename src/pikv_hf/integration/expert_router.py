"""Reading a model's own routers: which expert each token went to first."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .model_hook import place_hook

# Names under which the routed `*Experts` modules of transformers take their expert ids and weights.
_ID_ARGUMENTS = ("top_k_index", "router_indices", "selected_experts")
_WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights")
# LongCat's experts come with some that compute nothing, which tokens go to all the same.
_COUNT_ATTRIBUTES = (
    *("total_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_routed_experts",
)

# Computes something of a routing when asked.
Lazy = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertRouter:
    """Where a decoder layer's routing can be read. It does not keep the model alive.

    Attributes
    ----------
    num_experts : int
        Experts to choose from.
    reads_inputs : bool
        Whether the ids are among the module's arguments rather than its outputs.
    """

    _layer: "weakref.ref[nn.Module]"
    _module: "weakref.ref[nn.Module]"
    num_experts: int
    reads_inputs: bool

    @property
    def layer(self) -> nn.Module:
        """The decoder layer, around attention and router."""
        layer = self._layer()
        assert layer is not None, "the model is gone"
        return layer

    @property
    def module(self) -> nn.Module:
        """The module to hook: the experts, which are called with the chosen ids, or the router, which returns them."""
        module = self._module()
        assert module is not None, "the model is gone"
        return module

    def within(self, layer: nn.Module) -> "ExpertRouter":
        """Return the router as that of another module around attention and router."""
        return dataclasses.replace(self, _layer=weakref.ref(layer))

    def listen(self, deliver: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Call `deliver` with the primary experts of every forward pass; the handle ends it."""
        return self.watch(lambda experts, _: deliver(experts()))

    def watch(self, deliver: Callable[[Lazy, Lazy], None]) -> RemovableHandle:
        """Call `deliver` with two functions after every routing, for primary experts and for their confidence.

        They return `(T,)` int64 experts, and `(T,)` float32 shares of the routing weight, over all experts where the
        module tells, else among the chosen. The handle ends it.
        """
        if self.reads_inputs:
            names = list(inspect.signature(self.module.forward).parameters)
            ids, weights = _named(names, _ID_ARGUMENTS), _named(names, _WEIGHT_ARGUMENTS)

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                chosen, strength = given[ids], given.get(weights)
                deliver(lambda: primary_experts(chosen, strength), lambda: confidence_of_weights(chosen, strength))

            return place_hook(self.module.register_forward_pre_hook, before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            scores = router_scores(output, self.num_experts)
            deliver(lambda: scores.argmax(dim=-1), lambda: confidence_of_scores(scores))

        return place_hook(self.module.register_forward_hook, after)


def confidence_of_weights(ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the largest share of each token's routing weights, `(T,)` float32; 1 without weights.

    `ids` are `(T, k)`, `weights` `(T, k)` or over all experts.
    """
    if weights is None:
        return torch.ones(ids.reshape(-1, ids.shape[-1]).shape[0], device=ids.device)
    rows = weights.reshape(ids.reshape(-1, ids.shape[-1]).shape[0], -1).float().abs()
    return rows.amax(dim=1) / rows.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def confidence_of_scores(scores: torch.Tensor) -> torch.Tensor:
    """Return the largest probability over all experts, `(T,)` float32, of logits or probabilities `(T, E)`."""
    scores = scores.float()
    are_shares = bool((scores >= 0).all()) and bool((scores.sum(dim=1) - 1).abs().max() < 1e-3)
    return (scores if are_shares else scores.softmax(dim=1)).amax(dim=1)


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
    if ids.ndim != 2:
        ids = ids.reshape(-1, ids.shape[-1])
    ids = ids.long()
    if weights is None or not ids.shape[0]:
        return ids[:, 0]
    if weights.ndim != 2 or weights.shape[0] != ids.shape[0]:
        weights = weights.reshape(ids.shape[0], -1)
    if weights.shape != ids.shape:
        weights = weights.gather(1, ids)
    return ids.gather(1, weights.argmax(dim=1, keepdim=True)).squeeze(1)


def router_scores(output: Any, num_experts: int) -> torch.Tensor:
    """Return what a router returned for all experts, `(T, E)` logits or probabilities.

    Parameters
    ----------
    output : tensor or tuple
        Holds a float tensor whose last size is `num_experts`.
    num_experts : int
        E.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    scores = [p for p in parts if torch.is_tensor(p) and p.is_floating_point() and p.shape[-1:] == (num_experts,)]
    if not scores:
        shapes = [tuple(part.shape) if torch.is_tensor(part) else type(part).__name__ for part in parts]
        raise RuntimeError(f"no router output has a last size of {num_experts} experts, got {shapes}")
    # Logits come last where a router returns both (Llama-4's scores are zero outside of the top k).
    return scores[-1].reshape(-1, num_experts)


def experts_from_output(output: Any, num_experts: int) -> torch.Tensor:
    """Return the primary experts, `(T,)` int64, from what a router returned; see :func:`router_scores`."""
    return router_scores(output, num_experts).argmax(dim=-1)


def find_expert_router(layer: nn.Module, attention: nn.Module, config: Any) -> ExpertRouter | None:
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
            return _expert_router(layer, module, config, reads_inputs=True)
    for module in modules:
        name = type(module).__name__
        if any(word in name for word in ("Router", "Gating", "TopKGate")):
            return _expert_router(layer, module, config, reads_inputs=False)
    experts = _num_experts(layer, config) or 0
    for module in modules:
        # Aria's router is no more than this: the experts take its logits.
        if isinstance(module, nn.Linear) and module.out_features == experts > 1 and _is_beside_experts(module, modules):
            return _expert_router(layer, module, config, reads_inputs=False)
    return None


def _is_beside_experts(module: nn.Module, modules: list[nn.Module]) -> bool:
    """Return whether a module is part of one that has experts, as a router is and an adapter's matrix is not."""
    return any(hasattr(each, "experts") and any(part is module for part in each.children()) for each in modules)


def _expert_router(layer: nn.Module, module: nn.Module, config: Any, reads_inputs: bool) -> ExpertRouter | None:
    count = _num_experts(module, config)
    return None if count is None else ExpertRouter(weakref.ref(layer), weakref.ref(module), count, reads_inputs)


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
