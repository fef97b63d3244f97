"""Fit routers without training: balanced k-means on what a layer's feed-forward network is given.

A router is linear and has no bias, k-means needs one: `|x - c|^2` is least where `c.x - |c|^2 / 2` is largest. A
direction along which all inputs measure nearly one stands in for the constant (least squares find it). What is added
along it is then moved, expert by expert, to where each gets its share: the auction algorithm for balanced assignment.
"""

from collections.abc import Sequence
from typing import Any

import torch

#: Rounds of k-means, sweeps of balancing within each of them, and at the end.
ROUNDS, SHORT, LONG = 15, 2, 20


@torch.no_grad()
def ffn_inputs(model: Any, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what each layer's feed-forward network is given, `(L, T, hidden)` float32, for prompts `(1, t)`."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, given, noted=noted: noted.append(given[0][0].float()))
        for layer, noted in zip(model.model.layers, seen, strict=True)
    ]
    try:
        for ids in prompts:
            model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(noted) for noted in seen])


def fit_router(inputs: torch.Tensor, experts: int, chosen: int) -> torch.Tensor:
    """Return the weight of a router under which inputs of one kind go to one expert, and all experts get their share.

    Deterministic: the first centres are inputs at even distances.

    Parameters
    ----------
    inputs : torch.Tensor
        `(T, hidden)` float32, at least as many as experts.
    experts, chosen : int
        How many there are, and how many a token goes to.

    Returns
    -------
    torch.Tensor
        `(experts, hidden)` float32, its logits with a standard deviation of one over inputs and experts.
    """
    one = torch.linalg.lstsq(inputs, torch.ones(len(inputs), 1), driver="gelsd").solution.T
    constant = inputs @ one.T
    centres = inputs[torch.arange(experts) * len(inputs) // experts]
    for _ in range(ROUNDS):
        bias = _balanced(inputs @ centres.T, constant, -centres.square().sum(1) / 2, 1, SHORT)
        nearest = (inputs @ centres.T + bias * constant).argmax(1)
        ours = torch.nn.functional.one_hot(nearest, experts).float()
        # A centre that lost all its inputs stays where it is.
        means = ours.T @ inputs / ours.sum(0).clamp(min=1)[:, None]
        centres = torch.where(ours.any(0)[:, None], means, centres)
    bias = _balanced(inputs @ centres.T, constant, -centres.square().sum(1) / 2, chosen, LONG)
    weight = centres + bias[:, None] * one
    return weight / (inputs @ weight.T).std()


def _balanced(
    scores: torch.Tensor, constant: torch.Tensor, bias: torch.Tensor, chosen: int, sweeps: int
) -> torch.Tensor:
    """Return a bias `(E,)` that, times the constant `(T, 1)`, makes the choices by scores `(T, E)` even."""
    bias, share = bias.clone(), len(scores) * chosen // scores.shape[1]
    for each in list(range(len(bias))) * sweeps:
        others = (scores + bias * constant).index_fill(1, torch.tensor(each), -torch.inf).topk(chosen, dim=1).values
        # What this expert needs, token by token, to be chosen there instead of the last one that is.
        needed = (others[:, -1] - scores[:, each]) / constant[:, 0].clamp(min=0.1)
        bias[each] = needed.kthvalue(share).values
    return bias


def loads(inputs: torch.Tensor, weight: torch.Tensor, chosen: int) -> torch.Tensor:
    """Return the share of choices that each expert gets, `(E,)`, summing to 1."""
    return _shares(inputs @ weight.T, chosen)


def _shares(scores: torch.Tensor, chosen: int) -> torch.Tensor:
    picked = scores.topk(chosen, dim=1).indices.flatten()
    return torch.bincount(picked, minlength=scores.shape[1]) / len(picked)
