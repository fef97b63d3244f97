"""Bounds on the keys of a page bound the logit of every token in it."""

from typing import Any

import pytest
import routing_reference as slow
import torch
from fake_attachment import HEADS, KEY_DIM, SCALE
from families import FAMILIES, prompts
from routing_reference import choose, full_pages, grow, grown
from routing_runs import SMALL, generate, queries

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.config import CODECS
from pikv_hf.kernels.page_codes import BITS, spread_values
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.pages.pool_id import PLAIN, PoolId


@pytest.mark.parametrize("codec", CODECS)
def test_bounds_bound_every_logit(codec: str) -> None:
    """After cropping, growing anew in the pages given back, forking and writing to shared pages."""
    layer = grown(prompt=130, batch=2, key_codec=codec, value_codec="none", rank=4, routing="page_bound", max_pages=3)
    for each in _lives(layer):
        query = queries(each)
        bounds = each.table.view.full_pages().bounds(query).double()
        for row in range(2):
            columns = each.table.view.full_pages().pages[row].tolist()
            for page in full_pages(each, row):
                assert page.where[1] in columns
                column = _column(each, row, page)
                for head in range(HEADS):
                    own = slow.queries_of(each, query, row, head).double()
                    logits = own @ page.keys[head].T
                    slack = _slack(each, page, head, own)
                    assert bounds[head, row, column] >= logits.max() - slack - 1e-5
                    if slack == 0:
                        assert bounds[head, row, column] == pytest.approx(page.bound(head, own), abs=1e-4)


def by_routing(name: str) -> dict[str, Any]:
    return {"routing": name} if name == "all" else {"routing": name, "max_pages": 4}


def _lives(layer: PiKVLayer) -> Any:
    """Yield the layer and forks of it at several points of their lives, bounds having been found at each of them."""
    query = queries(layer)
    choose(layer, query)
    twin = layer.fork()
    yield layer
    layer.crop(97)
    choose(layer, query)
    yield layer
    for _ in range(40):
        grow(layer, 1, scale=3.0)
        choose(layer, query)
    yield layer
    yield twin
    for _ in range(30):
        grow(twin, 1, scale=0.3)
    choose(twin, query)
    layer.reset()
    yield twin
    twin.crop(110)
    grow(twin, 37, scale=2.0)
    yield twin


def _column(layer: PiKVLayer, row: int, page: slow.Page) -> int:
    index = layer.table.view.full_pages()
    part = index.columns[page.where[0]]
    return part.start + index.pages[row, part].tolist().index(page.where[1])


def _slack(layer: PiKVLayer, page: slow.Page, head: int, own: torch.Tensor) -> float:
    """Return how far decoded keys may lie beyond bounds: half a step of the codes, in channels that carry more bits.

    Keys that are not packed, or whose bounds were taken from what they are decoded to, may not.
    """
    pool = layer.table.pools.by_id()[page.where[0]]
    codes = getattr(pool, "keys", None)
    if page.where[0] == PLAIN or codes.kind not in BITS or codes.latent is not None:
        return 0.0
    number = page.where[1]
    outliers = codes.outliers[head, number].long()
    steps = spread_values(codes.spread[head, number])[outliers].double() / codes.levels
    # What is left is the rounding of the least values to 16 bits, and of the products.
    rounding = 2**-10 * codes.floor[head, number].double().abs()
    return float((own[:, outliers].abs() @ (steps / 2)).max() + (own.abs() @ rounding).max())


def test_exact_routing_finds_no_bounds() -> None:
    layers = []
    for name in ("all", "page_bound"):
        torch.manual_seed(0)
        layers.append(grown(**by_routing(name)))
        attend(layers[-1], queries(layers[-1])[:, :, None], scale=SCALE)
    every, routed = layers
    assert every.table.plain.bounds is None
    extra = live_bytes(routed.table.plain.tensors()) - live_bytes(every.table.plain.tensors())
    assert (
        extra == live_bytes([routed.table.plain.bounds.ends]) == routed.table.plain.capacity * HEADS * 2 * KEY_DIM * 4
    )


def test_the_report_counts_bounds() -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    reports = {}
    for name in ("all", "page_bound"):
        cache = PiKVCache.for_model(model, **SMALL, **by_routing(name))
        generate(model, prompts(1, 140), cache)
        reports[name] = cache.memory_report()
        ends = [layer.table.plain.bounds for layer in cache.layers]
        assert [bounds is None for bounds in ends] == [name == "all"]
    assert reports["page_bound"].keys == reports["all"].keys
    added = sum(live_bytes(bounds.tensors()) + bounds.host_bytes for bounds in ends)
    assert reports["page_bound"].total >= reports["all"].total + added > reports["all"].total


def test_integer_codes_are_their_own_bounds() -> None:
    layer = grown(prompt=180, key_codec="int4", value_codec="int4", routing="page_bound", max_pages=3)
    choose(layer, queries(layer))
    assert PoolId.parse("int4") in layer.table.view.full_pages().pools
    assert layer.table.pools.packed[PoolId.parse("int4")].bounds is None
