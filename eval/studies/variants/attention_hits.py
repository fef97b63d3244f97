"""How much of what attention looks for a variant's steps find: hits are attention that falls on what is read.

What the exact model attends to is recorded once. A step of a variant reads what its press has left, and of that, with
routing, what its policy chose; the exact model's attention to it is the hit rate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.variants.request_runs import Variant, Work, step
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.routing.policy import Choice, RoutingPolicy
from pikv_hf.routing.routing_view import RoutingView

#: By step and layer, `(Hq, T)`.
Attention = Sequence[Sequence[torch.Tensor]]


@torch.inference_mode()
def exact_attention(model: Any, work: Work, steps: int) -> Attention:
    """Return what each of the first steps of the first request pays to all tokens, with nothing left out.

    The model must not be attached to a cache.
    """
    cache, request = DynamicCache(config=model.config), work.requests[0]
    step(model, cache, work.context)
    step(model, cache, request[:, : work.prompt])
    before, found = model.config._attn_implementation, []
    # Other implementations do not return it.
    model.set_attn_implementation("eager")
    try:
        for token in range(work.prompt, work.prompt + steps):
            read = model(request[:, token : token + 1], **cache_argument(cache), output_attentions=True)
            found.append([layer[0, :, 0].float() for layer in read.attentions])
    finally:
        model.set_attn_implementation(before)
    return found


@torch.inference_mode()
def hit_rate(model: Any, variant: Variant, work: Work, exact: Attention) -> float | None:
    """Return the share of the exact attention that falls on what steps read, mean over steps, layers and heads.

    None where a press renumbers what it leaves, as most of kvpress's do: which tokens these were is not known then.
    """
    cache = variant.cache(model)
    with variant.reading(model):
        step(model, cache, work.context)
    request = work.requests[0]
    step(model, cache, request[:, : work.prompt])
    watched = [_watch(layer) for layer in cache.layers]
    hits = []
    for at, shares in enumerate(exact, start=work.prompt):
        step(model, cache, request[:, at : at + 1])
        for layer, own, watcher in zip(cache.layers, shares, watched, strict=True):
            read = read_of(layer, watcher)
            if read.shape[-1] != own.shape[-1]:
                variant.leave(model)
                return None
            grouped = own.view(len(read), -1, own.shape[-1])
            # In bf16 shares do not add up to one.
            hits.append(((grouped * read[:, None]).sum(-1) / grouped.sum(-1)).mean())
    variant.leave(model)
    return float(torch.stack(hits).mean())


class Watcher(RoutingPolicy):
    """Chooses as another policy does, and remembers which positions a step does not read."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self.unread: list[torch.Tensor] = []

    def prepare(self, pools: Any) -> None:
        """Have pools keep what the other policy ranks by."""
        self._policy.prepare(pools)

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the other policy's."""
        return self._policy.rank(view)

    def choose(self, view: RoutingView) -> Choice | None:
        """Return the other policy's choice."""
        choice = self._policy.choose(view)
        self.unread = [] if choice is None else _unread(view, choice)
        return choice


def _unread(view: RoutingView, choice: Choice) -> list[torch.Tensor]:
    """Return the positions in full pages of one sequence that are not read, for each KV head.

    Heads are those of a row, or rows of one head where a press has given each head tokens of its own.
    """
    index, columns = view.index, choice.columns.flatten(0, 1)
    taken = torch.ones_like(columns, dtype=torch.bool) if choice.taken is None else choice.taken.flatten(0, 1)
    read = torch.zeros(len(columns), index.width, dtype=torch.bool).scatter_(1, columns, taken)
    pages, valid = (part.expand(len(columns), -1) for part in (index.pages, index.valid))
    held = [pool.positions[pages[:, index.columns[name]]] for name, pool in index.pools.items()]
    positions, passed = torch.cat(held, dim=1), ~read & valid
    found = [own[unread].flatten().long() for own, unread in zip(positions, passed, strict=True)]
    return [own[own >= 0] for own in found]


def _watch(layer: Any) -> Watcher | None:
    """Watch what the steps of a layer choose; None if they choose nothing."""
    if not isinstance(layer, PiKVLayer) or layer.parts[0].page_router is None:
        return None
    router = layer.parts[0].page_router
    router.policy = Watcher(router.policy)
    return router.policy


def read_of(layer: Any, watcher: Watcher | None) -> torch.Tensor:
    """Return `(H, T)` bool, what the latest step of a layer of one sequence has read."""
    if not isinstance(layer, PiKVLayer):
        return torch.ones(layer.keys.shape[1:3], dtype=torch.bool)
    read = layer.stored_mask()[0].clone()
    if watcher is not None and watcher.unread:
        for own, unread in zip(read, watcher.unread, strict=True):
            own[unread] = False
    return read
