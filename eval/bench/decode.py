"""Time decoding, beam reordering and prefill against `DynamicCache` with SDPA attention, in one run."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.integration.attention_function import pikv_attention_forward

# The geometry of Qwen3-30B-A3B's attention.
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls: the 20th, 50th and 80th percentile, the mean, and how many there were."""

    p20: float
    p50: float
    p80: float
    mean: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise measured seconds."""
        ordered = sorted(seconds)
        p20, p50, p80 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80, statistics.fmean(ordered), len(ordered))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One case: what was timed, on which sizes, for both caches.

    Attributes
    ----------
    name : str
        The operation.
    batch, tokens : int
        Rows and cached tokens.
    pikv, dynamic : Timing
        Seconds per call.
    ratio : float
        Median of `dynamic` over median of `pikv`: above 1, PiKV is faster.
    mean_ratio : float
        The same for the means, which include the steps that move pages.
    max_difference : float
        Largest absolute difference of the two outputs.
    codec : str
        How PiKV keeps full pages.
    to_none : float or None
        Median of PiKV with this codec over its median with `"none"`, in the same run: below 1, the codec is faster.
        None if `"none"` was not timed.
    kv_bytes : int or None
        Live bytes of PiKV's cache at the end.
    routing : str
        Which pages PiKV reads: `"all"`, or a policy and the most pages, `"page_bound:64"`. The difference of the
        outputs then says nothing: keys are random, and no page is better than another.
    """

    name: str
    batch: int
    tokens: int
    pikv: Timing
    dynamic: Timing
    ratio: float
    mean_ratio: float
    max_difference: float
    codec: str = "none"
    to_none: float | None = None
    kv_bytes: int | None = None
    routing: str = "all"


def compared(
    name: str, batch: int, tokens: int, pikv: Sequence[float], dynamic: Sequence[float], difference: float
) -> Comparison:
    """Return a case of these seconds of both caches."""
    ours, theirs = Timing.of(pikv), Timing.of(dynamic)
    return Comparison(name, batch, tokens, ours, theirs, theirs.p50 / ours.p50, theirs.mean / ours.mean, difference)


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(*args, **kwargs)
    return time.perf_counter() - start, result


def geometry_model(layers: int = 1, hidden: int = 256) -> Any:
    """Return a random Qwen3-MoE with the attention geometry of Qwen3-30B-A3B and a small feed-forward."""
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1 << 18,
    )
    return Qwen3MoeForCausalLM(config).eval()


def _random_kv(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, KV_HEADS, tokens, HEAD_DIM), torch.randn(batch, KV_HEADS, tokens, HEAD_DIM)


def filled_pikv(model: Any, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> PiKVCache:
    """Return a cache of one layer that holds these K/V, `(B, H, T, D)`, in shards of random experts."""
    cache = PiKVCache.for_model(model, **options)
    fill_layer(cache.layers[0], keys, values)
    return cache


def fill_layer(layer: Any, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
    """Store K/V `(B, H, T, D)` in a layer of an attached `PiKVCache`, as a prompt whose experts are random.

    `valid` is `(B, T)` bool, False for padding.
    """
    layer.update_from_attention(keys, values)
    layer.attend_begins(valid)
    if layer.has_expert_router:
        layer.record_experts(_random_experts(keys.shape[0] * keys.shape[2]))
    else:
        layer.attend_ends()


def _random_experts(count: int) -> torch.Tensor:
    return torch.randint(0, 32, (count,))


def run_decode(
    contexts: Sequence[int],
    batches: Sequence[int],
    seconds: float = 6.0,
    codecs: Sequence[str] = ("none",),
    routing: str = "all",
    max_pages: int = 64,
) -> Iterator[Comparison]:
    """Time one decoding step of one layer: appending a token and attending to everything.

    Parameters
    ----------
    contexts : sequence of int
        Cached tokens.
    batches : sequence of int
        Rows.
    seconds : float
        Time to spend on each case; at least 5 steps of each cache are taken in turn. PiKV always takes 64 more, so that
        its mean includes moving pages to shards.
    codecs : sequence of str
        Codecs of keys and values; a case for each, with `"none"` timed beside it if that is one of them.
    routing, max_pages
        As in :class:`~pikv_hf.PiKVConfig`.
    """
    routed = {"routing": routing, "max_pages": max_pages}
    model = geometry_model()
    attention = model.model.layers[0].self_attn
    for tokens, batch, codec in itertools.product(contexts, batches, codecs):
        # Each beside "none" alone: memory that a machine has not touched for a while is slow to come back.
        together = tuple(dict.fromkeys(("none", codec) if "none" in codecs else (codec,)))
        for case in _decode_case(model, attention, batch, tokens, seconds, together, routed):
            if case.codec == codec:
                yield case


@torch.no_grad()
def _decode_case(
    model: Any,
    attention: Any,
    batch: int,
    tokens: int,
    seconds: float,
    codecs: Sequence[str],
    routed: dict[str, Any],
) -> Iterator[Comparison]:
    keys, values = _random_kv(batch, tokens)
    caches = {name: filled_pikv(model, keys, values, key_codec=name, value_codec=name, **routed) for name in codecs}
    dynamic = DynamicCache(config=model.config)
    dynamic.update(keys, values, 0)
    del keys, values
    ours: dict[str, list[float]] = {name: [] for name in codecs}
    theirs: list[float] = []
    difference = dict.fromkeys(codecs, 0.0)
    started = time.perf_counter()
    while len(theirs) < 6 or time.perf_counter() - started < seconds:
        step = _decode_inputs(batch)
        spent, their_out = timed(_their_step, dynamic, attention, *step)
        theirs.append(spent)
        for name, cache in caches.items():
            spent, our_out = timed(_our_step, cache, attention, *step)
            ours[name].append(spent)
            difference[name] = max(difference[name], float((our_out - their_out).abs().max()))
    del dynamic
    for _ in range(64):
        step = _decode_inputs(batch)
        for name, cache in caches.items():
            ours[name].append(timed(_our_step, cache, attention, *step)[0])
    plain = Timing.of(ours["none"][1:]).p50 if "none" in ours else None
    for name, cache in caches.items():
        # The first step pays for allocations on either side.
        case = compared("decode", batch, tokens, ours[name][1:], theirs[1:], difference[name])
        to_none = None if plain is None else case.pikv.p50 / plain
        which = routed["routing"] if routed["routing"] == "all" else f"{routed['routing']}:{routed['max_pages']}"
        yield dataclasses.replace(case, codec=name, to_none=to_none, kv_bytes=cache.nbytes, routing=which)


def _decode_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM), *_random_kv(batch, 1)


def _our_step(
    cache: PiKVCache, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    keys, values = cache.layers[0].update_from_attention(key, value)
    out, _ = pikv_attention_forward(attention, query, keys, values, None, scaling=attention.scaling)
    cache.layers[0].record_experts(_random_experts(query.shape[0]))
    return out


def _their_step(
    cache: DynamicCache, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    keys, values = cache.update(key, value, 0)
    out, _ = sdpa_attention_forward(attention, query, keys, values, None, scaling=attention.scaling)
    return out


@torch.no_grad()
def run_reorder(beams: int = 8, tokens: int = 32768, repeats: int = 5) -> Iterator[Comparison]:
    """Time `reorder_cache` of one layer, for beams that share their prompt and for rows that share nothing."""
    model = geometry_model()
    for name, rows in (("reorder shared", 1), ("reorder separate", beams)):
        keys, values = _random_kv(rows, tokens)
        pikv = filled_pikv(model, keys, values)
        pikv.batch_repeat_interleave(beams // rows)
        dynamic = DynamicCache(config=model.config)
        dynamic.update(keys.repeat_interleave(beams // rows, 0), values.repeat_interleave(beams // rows, 0), 0)
        del keys, values
        ours: list[float] = []
        theirs: list[float] = []
        for repeat in range(repeats):
            # Every row stays alive: a permutation, as in the steps of a beam search that keep all beams.
            order = torch.randperm(beams, generator=torch.Generator().manual_seed(repeat))
            ours.append(timed(pikv.reorder_cache, order)[0])
            theirs.append(timed(dynamic.reorder_cache, order)[0])
        difference = float((pikv.layers[0].keys[:, :, :64] - dynamic.layers[0].keys[:, :, :64]).abs().max())
        yield compared(name, beams, tokens, ours, theirs, difference)


@torch.no_grad()
def run_prefill(tokens: int = 8192, repeats: int = 3) -> Iterator[Comparison]:
    """Time a prompt through a model of two layers: everything, from embeddings to stored pages."""
    model = geometry_model(layers=2)
    ids = torch.randint(0, 1024, (1, tokens))
    ours, theirs, difference = [], [], 0.0
    for _ in range(repeats + 1):
        # Attaching is set-up, not prefill; without it the model runs transformers' own SDPA.
        pikv = PiKVCache.for_model(model)
        spent, our_out = timed(model, ids, **cache_argument(pikv), logits_to_keep=1)
        ours.append(spent)
        detach(model)
        dynamic = DynamicCache(config=model.config)
        spent, their_out = timed(model, ids, **cache_argument(dynamic), logits_to_keep=1)
        theirs.append(spent)
        difference = max(difference, float((our_out.logits - their_out.logits).abs().max()))
    yield compared("prefill", 1, tokens, ours[1:], theirs[1:], difference)
