"""Layers filled with random tokens, and routing over them in loops over pages, from the keys that pages hold."""

import dataclasses
import math
from typing import Any

import torch
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM, FakeAttachment
from padded_masks import only_padding

from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.kernels import decode_pages, encode_pages
from pikv_hf.kernels.page_codes import BITS, SPREAD_ONE, SPREAD_STEPS
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.pages.pool_id import PLAIN, PoolId
from pikv_hf.routing.policy import Choice

SMALL = {"page_size": 4, "recent_window": 6, "sink_tokens": 4, "num_shards": 3}


def make_layer(**options: Any) -> PiKVLayer:
    return PiKVLayer(0, PiKVConfig(**{**SMALL, **options}), FakeAttachment())


def grow(layer: PiKVLayer, new: int, batch: int = 2, valid: torch.Tensor | None = None, scale: float = 1.0) -> None:
    """Append random tokens, of which `valid` `(B, new)` are real; padding is for the first call alone."""
    layer.settle()
    keys, values = scale * torch.randn(batch, HEADS, new, KEY_DIM), torch.randn(batch, HEADS, new, VALUE_DIM)
    got = layer.update(keys, values)
    mask, shown = None, torch.ones(batch, layer.seen, dtype=torch.bool)
    if (padding := layer.state.padding) is not None:
        shown[:, : padding.shape[1]] = ~torch.from_numpy(padding)
    if valid is not None:
        shown[:, -new:] = valid
    if not bool(shown.all()):
        causal = torch.ones(new, layer.seen, dtype=torch.bool).tril(layer.seen - new)
        mask = only_padding((causal & shown[:, None])[:, None], shown)
    queries = torch.randn(batch, HEADS * GROUPS, new, KEY_DIM)
    pikv_attention_forward(ATTENTION, queries, *got, mask, scaling=SCALE)
    layer.record_experts(torch.randint(0, EXPERTS, (batch * new,)))
    layer.settle()


def grown(prompt: int = 150, batch: int = 2, padding: int = 0, steps: int = 5, **options: Any) -> PiKVLayer:
    """Return a layer with a prompt, of which the first row lacks `padding` tokens, and some decoded tokens."""
    layer = make_layer(**options)
    valid = torch.ones(batch, prompt, dtype=torch.bool)
    valid[0, :padding] = False
    grow(layer, prompt, batch, valid if padding else None)
    for _ in range(steps):
        grow(layer, 1, batch)
    return layer


@dataclasses.dataclass
class Page:
    """One full page of a row.

    Attributes
    ----------
    where : tuple
        Its pool and its number there.
    positions : list of int
        Of its tokens.
    keys : torch.Tensor
        `(H, count, D)` float64, decoded.
    coded : tuple, optional
        `(H, D)` float64, twice: the range of the codes of each channel, where keys are packed as integers.
    """

    where: tuple[PoolId, int]
    shard: int
    positions: list[int]
    keys: torch.Tensor
    coded: tuple[torch.Tensor, torch.Tensor] | None = None

    def bound(self, head: int, queries: torch.Tensor) -> float:
        """Return the largest, over queries `(G, D)`, of the largest product with any key between the bounds."""
        return max(_most(query, *self.ends(head)) for query in queries)

    def ends(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.coded is not None:
            return self.coded[0][head], self.coded[1][head]
        return self.keys[head].amin(dim=0), self.keys[head].amax(dim=0)


def _most(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> float:
    return float(torch.maximum(query * low, query * high).sum())


def full_pages(layer: PiKVLayer, row: int) -> list[Page]:
    """Return the full pages of a row of the layer's table."""
    assert layer.table is not None
    keys = layer.table.view.dense_part(layer.seen, KV.KEYS)[row].double()
    pages = []
    for name, pool in layer.table.pools.by_id().items():
        for number in layer.table.rows[row].full_pages(name).tolist():
            positions = [p for p in pool.positions[number].tolist() if p >= 0]
            coded = _code_range(pool, number) if name != PLAIN else None
            pages.append(Page((name, number), int(pool.shard[number]), positions, keys[:, positions], coded))
    return pages


def _code_range(pool: Any, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if pool.keys.kind not in BITS or pool.keys.latent is not None:
        return None
    floor = pool.keys.floor[:, number].double()
    return floor, floor + 2 ** ((pool.keys.spread[:, number].double() - SPREAD_ONE) / SPREAD_STEPS)


def always_read(layer: PiKVLayer, row: int) -> list[int]:
    """Return the positions of a row's tokens outside of full pages."""
    assert layer.table is not None
    pool = layer.table.plain
    return [p for page in layer.table.rows[row].unfilled() for p in pool.positions[page].tolist() if p >= 0]


def is_protected(layer: PiKVLayer, page: Page) -> bool:
    recent = layer.seen - layer.config.recent_window
    return min(page.positions) < layer.config.sink_tokens or max(page.positions) >= recent


def ranks(name: str, pages: list[Page], head: int, queries: torch.Tensor, config: PiKVConfig, costs: Any) -> list[Any]:
    """Return what each page is ranked by for queries `(G, D)` of one KV head; None leaves a page out."""
    queries = queries.double()
    shards = sorted({page.shard for page in pages})
    members = {shard: [page for page in pages if page.shard == shard] for shard in shards}
    if name == "expert_topk":
        nearness = {}
        for shard in shards:
            middles = [sum(page.ends(head)) / 2 for page in members[shard]]
            centroid = sum(middles) / len(middles)
            nearness[shard] = max(float(query @ centroid) for query in queries)
        order = sorted(shards, key=nearness.__getitem__)
        return [order.index(page.shard) * 1e6 + max(page.positions) for page in pages]
    bounds = [page.bound(head, queries) * SCALE for page in pages]
    if name == "cache_aware":
        return [bound - config.tier_cost * costs(page) for bound, page in zip(bounds, pages, strict=True)]
    if name == "hierarchical":
        best = {}
        for shard in shards:
            low = torch.stack([page.ends(head)[0] for page in members[shard]]).amin(dim=0)
            high = torch.stack([page.ends(head)[1] for page in members[shard]]).amax(dim=0)
            best[shard] = max(_most(query, low, high) for query in queries)
        kept = sorted(shards, key=best.__getitem__, reverse=True)[: math.ceil(len(shards) / 2)]
        return [bound if page.shard in kept else None for bound, page in zip(bounds, pages, strict=True)]
    assert name == "page_bound"
    return bounds


def shares_by_codes(pages: list[Page], head: int, queries: torch.Tensor, page_size: int) -> list[float]:
    """Return the share of each page in the attention of queries `(G, D)` to these pages, of keys in 2 bits each."""
    of_query = []
    for query in queries.double():
        masses = []
        for page in pages:
            # What fills a page up changes no range.
            keys = page.keys[head].float()
            filled = torch.cat([keys, keys[:1].expand(page_size - len(keys), -1)])[None, None]
            coded = decode_pages(encode_pages(filled, "int2", keys=True, backend="torch"), torch.float32)[0, 0].double()
            masses.append(sum(math.exp(float(query @ key) * SCALE) for key in coded[: len(keys)]))
        of_query.append([mass / sum(masses) for mass in masses])
    return [sum(shares) / len(queries) for shares in zip(*of_query, strict=True)]


def estimated_shares(pages: list[Page], head: int, queries: torch.Tensor) -> list[float]:
    """Return the share of each page in the attention of queries `(G, D)`, estimated from the bounds of its keys."""
    shares = [0.0] * len(pages)
    for query in queries.double():
        masses = []
        for page in pages:
            low, high = page.ends(head)
            middle, half = float(query @ (low + high)) / 2, float(query.abs() @ (high - low)) / 2
            # Two standard deviations of a sum of D numbers, each spread evenly, weighed by normal ones.
            deviation = half * math.sqrt(1 / 3) / math.sqrt(2 / math.pi) / math.sqrt(KEY_DIM)
            masses.append(math.exp((middle + 2 * deviation) * SCALE))
        for index, mass in enumerate(masses):
            shares[index] += mass / sum(masses) / len(queries)
    return shares


def most_pages(config: PiKVConfig, free: int) -> int:
    """Return how many of `free` pages may be chosen."""
    if isinstance(config.max_pages, int):
        return min(config.max_pages, free)
    return math.ceil(config.max_pages * free)


def queries_of(layer: PiKVLayer, query: torch.Tensor, row: int, head: int) -> torch.Tensor:
    """Return the queries `(G, D)` of a KV head of a row of the table, from `(B, Hq, D)`."""
    assert layer.table is not None
    heads = layer.table.plain.keys.shape[0]
    return query.reshape(len(layer.table.rows), heads, -1, query.shape[-1])[row, head]


def choose(layer: PiKVLayer, query: torch.Tensor) -> Choice | None:
    """Return what the layer's router chooses for queries `(B, Hq, D)`, lanes or not."""
    assert layer.table is not None
    assert layer.parts[0].page_router is not None
    by_row = query.reshape(len(layer.table.rows), -1, query.shape[-1])
    return layer.parts[0].page_router.choose(layer.table.view.full_pages(), by_row, SCALE, layer.seen)


def chosen(layer: PiKVLayer, choice: Choice | None, row: int, head: int) -> set[tuple[str, int]]:
    """Return the pool and number of each page that is read."""
    assert layer.table is not None
    index = layer.table.view.full_pages()
    if choice is None:
        return {page.where for page in full_pages(layer, row)}
    found = []
    for place, column in enumerate(choice.columns[head, row].tolist()):
        if choice.taken is None or choice.taken[head, row, place]:
            assert index.valid[row, column]
            name = next(name for name, part in index.columns.items() if part.start <= column < part.stop)
            found.append((name, int(index.pages[row, column])))
    assert len(set(found)) == len(found), "a page is read twice"
    return set(found)


def dense_attention(layer: PiKVLayer, query: torch.Tensor, row: int, head: int, positions: list[int]) -> torch.Tensor:
    """Return attention of the queries of a KV head of a row over the tokens at these positions, `(G, Dv)` float64."""
    assert layer.table is not None
    keys, values = (part[row, head, positions].double() for part in layer.table.view.dense(layer.seen))
    logits = queries_of(layer, query, row, head).double() @ keys.T * SCALE
    return logits.softmax(dim=-1) @ values
