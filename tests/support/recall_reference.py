"""Recall by its formula, in float64 and one query after the other."""

import math

import torch

from pikv_hf.allocation.recall import BLOCK, SINKS


def expected_recall(
    query: torch.Tensor,
    moved: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `(T,)` of one KV head: queries and moved queries `(G, T, D)`, keys `(T, D)`, the first keys `(S, D)`."""

    def logits(of: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        values = scale * of.double() @ key.double().T
        return values if softcap is None else softcap * (values / softcap).tanh()

    groups, tokens, _ = query.shape
    start = keys[:SINKS] if first is None else first
    recalled, repeated, at_first = logits(moved, keys), logits(query, keys), logits(moved, start)
    best = [0.0] * tokens
    for group in range(groups):
        for at in range(tokens):
            block = at // BLOCK
            near = [j for j in range(tokens) if j // BLOCK - block in (0, 1)]
            others = [float(repeated[group, at, j]) for j in range(max(0, block - 1) * BLOCK, at + 1)]
            others += [float(at_first[group, at, j]) for j in range(len(start)) if first is not None or j not in near]
            others += [] if sinks is None else [float(sinks[group])]
            wanted = {j: float(recalled[group, at, j]) for j in near}
            top = max([*wanted.values(), *others])
            total = sum(math.exp(value - top) for value in [*wanted.values(), *others])
            for j, value in wanted.items():
                best[j] = max(best[j], math.exp(value - top) / total)
    return torch.tensor(best)
