"""How a variant serves requests: a context is read once and compressed, each request goes on from a copy of it."""

import contextlib
import copy
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.decode import timed
from pikv_hf.eval.demo.measure import total_bytes
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.layer.layer import PiKVLayer


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A cache and a press.

    Attributes
    ----------
    name : str
        As tables call it.
    parts : tuple of str
        Variants that do one part of what this one does, each alone.
    options : dict or None
        Of `PiKVCache.for_model`; None is `DynamicCache`.
    press : str
        As `pikv eval` takes it; none if empty.
    ratio : float or None
        Of the press: the share that goes; None if the press says so itself.
    """

    name: str
    parts: tuple[str, ...] = ()
    options: dict[str, Any] | None = None
    press: str = ""
    ratio: float | None = 0.0

    def cache(self, model: Any) -> Cache:
        """Return an empty cache."""
        if self.options is None:
            return DynamicCache(config=model.config)
        return PiKVCache.for_model(model, **self.options)

    def reading(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Return what the context is read in."""
        return press_factory(self.press, self.ratio).make()(model) if self.press else contextlib.nullcontext()

    def leave(self, model: Any) -> None:
        """Take off the model what this variant has put on it."""
        if self.options is not None:
            detach(model)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What is asked of every variant.

    Attributes
    ----------
    context : torch.Tensor
        `(1, T)`, read once.
    requests : tuple of torch.Tensor
        Each `(1, P + N)`: a prompt of P tokens, and N that are written, as given.
    prompt : int
        P.
    """

    context: torch.Tensor
    requests: tuple[torch.Tensor, ...]
    prompt: int

    @classmethod
    def of(cls, tokens: torch.Tensor, start: int, context: int, prompt: int, new: int, requests: int) -> "Work":
        """Cut `(M,)` tokens of a text from `start` on: the context, then one request after the other."""
        size = prompt + new
        end = start + context + requests * size
        if end > len(tokens):
            raise ValueError(f"the text has {len(tokens):,} tokens, of which {end:,} are needed")
        parts = tokens[start + context : end].view(requests, 1, size)
        return cls(tokens[None, start : start + context], tuple(parts), prompt)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of a variant.

    Attributes
    ----------
    latency : float
        Seconds that a request takes, mean: a copy of the context's cache, reading its prompt and writing, without the
        time of others in between.
    context_seconds : float
        To read the context and compress it.
    context_bytes, open_bytes : int
        Live bytes after the context, and of all requests' caches together at the end, what they share counted once.
    nats : float
        Mean negative log likelihood of what is written.
    imbalance, fullest : float or None
        Of the tokens per shard after the context: variance over mean, most over mean, means over layers; None without
        shards.
    """

    latency: float
    context_seconds: float
    context_bytes: int
    open_bytes: int
    nats: float
    imbalance: float | None
    fullest: float | None


@torch.inference_mode()
def serve(model: Any, variant: Variant, work: Work) -> Run:
    """Read the context, then serve all requests, a token of each in turn."""
    cache = variant.cache(model)
    context_seconds, _ = timed(read_context, model, variant, cache, work.context)
    context_bytes = total_bytes([cache])
    imbalance, fullest = shard_spread(cache)
    copies, spent, losses = [], [0.0] * len(work.requests), []
    for at, request in enumerate(work.requests):
        seconds, own = timed(copy.deepcopy, cache)
        copies.append(own)
        reading, logits = timed(step, model, own, request[:, : work.prompt])
        spent[at] += seconds + reading
        losses.append(_loss(logits, request[0, work.prompt]))
    for token, at in itertools.product(range(work.prompt, work.requests[0].shape[1]), range(len(copies))):
        request = work.requests[at]
        seconds, logits = timed(step, model, copies[at], request[:, token : token + 1])
        spent[at] += seconds
        if token + 1 < request.shape[1]:
            losses.append(_loss(logits, request[0, token + 1]))
    latency, nats = statistics.fmean(spent), statistics.fmean(losses)
    open_bytes = total_bytes(copies)
    variant.leave(model)
    return Run(latency, context_seconds, context_bytes, open_bytes, nats, imbalance, fullest)


def read_context(model: Any, variant: Variant, cache: Cache, ids: torch.Tensor) -> None:
    """Read a context, compress it, and have the cache store all of it."""
    with variant.reading(model):
        step(model, cache, ids)
    for layer in cache.layers:
        if isinstance(layer, PiKVLayer):
            layer.settle()


def step(model: Any, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Read tokens `(1, Q)` at the positions that follow those seen, and return the last one's logits `(V,)`."""
    logits: torch.Tensor = model(ids, **cache_argument(cache), logits_to_keep=1).logits
    return logits[0, -1]


def _loss(logits: torch.Tensor, token: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), token))


def shard_spread(cache: Cache) -> tuple[float | None, float | None]:
    """Return variance over mean, and most over mean, of the tokens of shards, means over layers and KV heads.

    None without shards, or where nothing is left in them.
    """
    if not isinstance(cache, PiKVCache):
        return None, None
    tokens = [
        # Where heads keep tokens of their own, each counts its own.
        [count / layer.store.lanes for count in memory.shard_tokens]
        for layer, memory in zip(cache.layers, cache.memory_report().layers, strict=True)
    ]
    spread = [_spread(counts) for counts in tokens if any(counts)]
    if not spread:
        return None, None
    return statistics.fmean(found[0] for found in spread), statistics.fmean(found[1] for found in spread)


def _spread(tokens: Sequence[float]) -> tuple[float, float]:
    mean = statistics.fmean(tokens)
    return statistics.pvariance(tokens) / mean, max(tokens) / mean
