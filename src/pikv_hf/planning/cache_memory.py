"""The bytes of a `PiKVCache`, predicted: pages, scales, bookkeeping and what is kept beside them.

The counts follow what the pools of `pages` allocate for `page_table`, and sizes are asked of the codecs themselves, so
that a change of the format shows here too; `eval/results/plan-validation.json` compares both.
"""

import dataclasses
import math

import numpy as np
import torch

from pikv_hf.codecs.codec import FIT_TOKENS_PER_DIM, Codec, is_lowrank
from pikv_hf.common.budget import Budget
from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig
from pikv_hf.kernels.page_codes import PageCodes, empty_codes
from pikv_hf.page_table.layer_encoders import MAX_ERROR_QUERIES
from pikv_hf.pages.packed_pool import PACKED_GROWTH
from pikv_hf.scheduling.layer_budget import LayerBudget

from .cache_contents import CacheContents
from .model_shape import LayerShape, ModelShape
from .page_counts import PageCounts, given_back, grown, page_counts, plain_pages, shard_loads, shards_of_part

# Bytes that the host keeps of a page: count, references, shard, whether it was used; whether it stays as it is, or its
# errors; and its number in the table of the sequence that holds it.
_PLAIN_NOTES, _PACKED_NOTES, _TABLE_ENTRY = 10, 29, 8
# Statistics of use: two shares and four steps of 4 bytes.
_USAGE = 24
# Queries that errors are judged by are those of so many newest positions.
_ERROR_QUERY_POSITIONS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class CacheBytes:
    """What a cache, or one layer or part of it, takes.

    Attributes
    ----------
    window : float
        K/V of sinks and recent window, and of bounded sliding layers.
    shards : float
        K/V of all other pages in use, scales included.
    free : float
        K/V of pages that pools have allocated and do not use.
    metadata : float
        Positions, expert ids, bookkeeping, bounds for routing, bases, observed queries.
    """

    window: float = 0.0
    shards: float = 0.0
    free: float = 0.0
    metadata: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all."""
        return self.window + self.shards + self.free + self.metadata

    def __add__(self, other: "CacheBytes") -> "CacheBytes":
        return CacheBytes(
            self.window + other.window,
            self.shards + other.shards,
            self.free + other.free,
            self.metadata + other.metadata,
        )


def stored_tokens(contents: CacheContents, layer: LayerShape, model: ModelShape) -> int:
    """Return how many of the tokens that a row has seen a layer stores: a budget lets a paged one keep some.

    Raises
    ------
    ValueError
        If the budget is less than what is never evicted.
    """
    tokens, options = contents.tokens, contents.options
    if layer.sliding is not None:
        return tokens
    paged = max(1, len(model.paged_layers))
    bounded = sum(each.sliding or 0 for each in model.layers)
    limit = LayerBudget.of(options, paged, bounded)
    if limit is None:
        return tokens
    most = limit.tokens_of(tokens, options.num_shards)
    if most is not None:
        return min(tokens, most * options.num_shards if limit.per_shard else most)
    assert limit.total_bytes is not None
    return _tokens_within(limit.total_bytes, contents, layer, model.dtype)


def _tokens_within(budget: int, contents: CacheContents, layer: LayerShape, dtype: str) -> int:
    """Return the most tokens of each sequence whose layer takes at most so many bytes."""
    free = dataclasses.replace(contents.options, budget=None, budget_scope=None, scheduler=None)
    low, high = 0, contents.tokens
    while low < high:
        middle = (low + high + 1) // 2
        if layer_bytes(layer, CacheContents(middle, contents.batch, free), dtype).total <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def layer_bytes(layer: LayerShape, contents: CacheContents, dtype: str) -> CacheBytes:
    """Return the bytes of one layer after a prompt of `tokens - generated` tokens and `generated` decoded ones.

    Parameters
    ----------
    layer : LayerShape
        Heads and dims.
    contents : CacheContents
        Its `tokens` are those that the layer stores.
    dtype : str
        Of K/V.

    Raises
    ------
    ValueError
        For negative sizes, or more generated tokens than there are.
    """
    tokens, batch, options = contents.tokens, contents.batch, contents.options
    generated, share = contents.generated, contents.share
    if not 0 <= generated <= tokens or batch < 1:
        raise ValueError(f"0 <= generated <= tokens and batch >= 1, got {generated}, {tokens} and {batch}")
    element = getattr(torch, dtype).itemsize
    if layer.sliding is not None:
        kept = min(tokens, layer.sliding + bool(generated))
        return CacheBytes(window=float(batch * (kept * layer.width * element + layer.state_bytes)))
    shares = shard_loads(layer, options, contents.loads)
    now = page_counts(tokens, options, shares, layer.experts, share)
    first = page_counts(tokens - generated, options, shares, layer.experts, share)
    packs = _packs(options, layer, now)
    plain_page = options.page_size * layer.width * element
    packed_page = packed_page_bytes(layer, options, dtype) if packs else plain_page
    held = now.window + now.open + (0 if packs else now.full)
    # A prompt's pages are packed before they are stored: the plain pool has room for one per shard.
    most = shards_of_part(options.num_shards, share) if packs else math.inf
    begun = first.window + min(first.open + first.full, most)
    flushes = round((now.tokens - first.tokens) / share / options.page_size)
    plain = given_back(
        batch * begun, batch * (first.window + (first.open if packs else first.open + first.full)), batch
    )
    if generated:
        plain = plain_pages(plain, batch * held, contents, now, flushes, bool(layer.experts))
    packed = grown(batch * first.full, batch * now.full, PACKED_GROWTH) if packs else 0.0
    return CacheBytes(
        window=batch * now.window * plain_page,
        shards=batch * (now.open * plain_page + now.full * packed_page),
        free=max(0.0, plain - batch * held) * plain_page + max(0.0, packed - batch * now.full * packs) * packed_page,
        metadata=_metadata(layer, contents, element, plain, packed, batch * (now.window + now.open + now.full)),
    )


def cache_bytes(model: ModelShape, contents: CacheContents, sliding_share: float = 1.0) -> CacheBytes:
    """Return the bytes of a whole cache, or of the part that one of several devices keeps.

    Parameters
    ----------
    model : ModelShape
        Its layers.
    contents : CacheContents
        Its `tokens` are those seen, of which a budget keeps some.
    sliding_share : float
        The part of the bounded sliding layers that is here, on average.
    """
    total, known = CacheBytes(), dict[LayerShape, CacheBytes]()
    for layer in model.layers:
        if layer not in known:
            kept = stored_tokens(contents, layer, model)
            # Under a budget pools are full, and whatever comes takes the place of what goes.
            new = min(contents.generated, kept) if kept == contents.tokens else 0
            part = layer_bytes(layer, dataclasses.replace(contents, tokens=kept, generated=new), model.dtype)
            known[layer] = part if layer.sliding is None else CacheBytes(window=part.window * sliding_share)
        total += known[layer]
    return total


def part_bytes(
    model: ModelShape, contents: CacheContents, parts: int, *, processes: bool = True, imbalance: float = 0.0
) -> CacheBytes:
    """Return the bytes of one of several parts of a cache: the window, and an equal share of everything else.

    Parameters
    ----------
    model, contents
        Of the whole cache, as in :func:`cache_bytes`.
    parts : int
        Devices or processes that share the pages.
    processes : bool
        Whether every part belongs to a process of its own, which has all sliding layers; else these are divided.
    imbalance : float
        By how much the fullest part exceeds its equal share; 0 for the average.

    Raises
    ------
    ValueError
        If there are no parts.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    share = 1.0 if parts == 1 else min(1.0, (1 + imbalance) / parts)
    sliding = 1.0 if processes else 1 / parts
    return cache_bytes(model, dataclasses.replace(contents, share=share), sliding)


def packed_page_bytes(layer: LayerShape, options: PiKVConfig, dtype: str) -> int:
    """Return the bytes of the codes of a page, scales included, of all KV heads."""
    total = 0
    for name, dim, which in (
        (options.key_codec, layer.key_dim, KV.KEYS),
        (options.value_codec, layer.value_dim, KV.VALUES),
    ):
        rank = min(dim, options.rank or max(1, dim // 4)) if is_lowrank(name) else 0
        # What "auto" will choose is not known before: it is counted as the int4 that it mostly chose.
        codec = Codec("int4" if name == "auto" else name, which, rank)
        codes = codec.empty(layer.kv_heads, options.page_size, dim, getattr(torch, dtype), torch.device("meta"))
        total += _page_bytes(codes)
    return total


def is_packed(options: PiKVConfig) -> bool:
    """Return whether full pages are packed by a codec."""
    return options.key_codec != "none" or options.value_codec != "none"


def kept_bounds(layer: LayerShape, options: PiKVConfig) -> int:
    """Return of how many channels routing keeps bounds beside pages: integer codes of keys tell theirs."""
    if options.routing in ("all", "page_mass"):
        return 0
    told = layer.key_dim if options.key_codec in ("int8", "int4", "int2", "auto") else 0
    return layer.bounds_dim - told


def key_codes_bytes(layer: LayerShape, options: PiKVConfig) -> int:
    """Return the bytes that routing keeps beside a page, of all KV heads, where it keeps keys in 2 bits."""
    if options.routing != "page_mass":
        return 0
    codes = empty_codes(
        "int2", layer.kv_heads, options.page_size, layer.bounds_dim, torch.float32, torch.device("meta"), keys=True
    )
    return _page_bytes(codes)


def _page_bytes(codes: PageCodes) -> int:
    return sum(t.element_size() * t.shape[0] * int(np.prod(t.shape[2:])) for t in codes.tensors())


def _packs(options: PiKVConfig, layer: LayerShape, counts: PageCounts) -> bool:
    if not is_packed(options):
        return False
    lowrank = [
        dim for name, dim in ((options.key_codec, layer.key_dim), (options.value_codec, layer.value_dim))
        if is_lowrank(name)
    ]  # fmt: skip
    return all(counts.full * options.page_size >= FIT_TOKENS_PER_DIM * dim for dim in lowrank)


def _metadata(
    layer: LayerShape, contents: CacheContents, element: int, plain: float, packed: float, in_use: float
) -> float:
    """Return the bytes kept beside K/V of so many pages of the plain and the packed pool, and of those in use."""
    options, size = contents.options, contents.options.page_size
    total = plain * (6 * size + _PLAIN_NOTES) + packed * (4 * size + _PACKED_NOTES) + in_use * _TABLE_ENTRY
    if options.budget is not None:
        total += (plain + packed) * _USAGE
    if channels := kept_bounds(layer, options):
        total += (packed or plain) * (2 * channels * layer.kv_heads * element + 1)
    if coded := key_codes_bytes(layer, options):
        total += (packed or plain) * (coded + 1)
    if is_packed(options):
        # Those of the prompt's end, later those of the steps that filled a page.
        seen = 1 if contents.generated > size else _ERROR_QUERY_POSITIONS
        queries = contents.batch * (layer.query_heads // layer.kv_heads) * seen
        total += layer.kv_heads * min(MAX_ERROR_QUERIES, queries) * layer.key_dim * element
        for name, dim in ((options.key_codec, layer.key_dim), (options.value_codec, layer.value_dim)):
            if is_lowrank(name):
                total += layer.kv_heads * dim * min(dim, options.rank or max(1, dim // 4)) * element
    return total


def budget_text(options: PiKVConfig) -> str:
    """Return a budget as one reads it: `"25% of the tokens"`, `"4,096 tokens"`, `"2GiB"`."""
    if options.budget is None:
        return "none"
    budget = Budget.parse(options.budget)
    if budget.unit == "share":
        return f"{budget.amount:.0%} of the tokens"
    return f"{int(budget.amount):,} tokens" if budget.unit == "tokens" else str(options.budget)
