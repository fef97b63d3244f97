"""Measure perplexity with the cache in the loop: what compressing a beginning does to predicting the rest."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.runner.meter import Cost, Meter
from pikv_hf.eval.tasks.perplexity import Window


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """Mean negative log likelihood in nats per scored token, how many were scored, and the cost."""

    nats: float
    scored: int
    cost: Cost


@torch.no_grad()
def score_window(model: Any, window: Window, chunk: int, cache: Any, press: Any, meter: Meter) -> WindowLoss:
    """Read and compress the prefill, then send the rest through the cache in chunks and look at its likelihood.

    Each token is predicted from the cache and the tokens before it, the first one behind the prefill from the prefill.
    """
    meter.start()
    with press(model) if press is not None else contextlib.nullcontext():
        last = _read(model, window.ids[:, : window.prefill], 0, cache, keep=1)
    meter.prefilled(cache)
    losses = []
    for start in range(window.prefill, window.ids.shape[1], chunk):
        ids = window.ids[:, start : start + chunk]
        logits = _read(model, ids, start, cache)
        losses.append(_nats(torch.cat([last, logits[:, :-1]], dim=1), ids))
        last = logits[:, -1:]
    cost = meter.finish(cache)
    nats = torch.cat(losses)[window.scored[window.prefill :].cpu()]
    return WindowLoss(float(nats.mean()), len(nats), cost)


def _read(model: Any, ids: torch.Tensor, start: int, cache: Any, keep: int = 0) -> torch.Tensor:
    """Return `(1, n, V)` logits of the last `keep` tokens, of all of them for 0."""
    # Positions count what was read, which is more than what a press has left in the cache.
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    return model(input_ids=ids, **cache_argument(cache), position_ids=positions, logits_to_keep=keep).logits


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return `(n,)` negative log likelihoods; summed in float32 whatever the model's dtype."""
    return torch.nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="none").cpu()
