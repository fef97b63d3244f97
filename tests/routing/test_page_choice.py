"""Which pages routing chooses, against loops over pages."""

import math
from typing import Any

import pytest
import routing_reference as slow
import torch
from fake_attachment import EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM
from routing_reference import choose, chosen, full_pages, grow, grown
from routing_runs import POLICIES, in_state, queries

import pikv_hf.attention.paged_attention
import pikv_hf.integration.attention_function
from pikv_hf import PiKVConfig
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.routing import routing_view
from pikv_hf.routing.page_router import make_routing


@pytest.mark.parametrize("max_pages", [1, 7, 0.3])
@pytest.mark.parametrize(
    "state", ["uniform", "padded", "lanes", "packed", "mixed widths", "cropped", "rebuilt, grown again", "no window"]
)
@pytest.mark.parametrize("name", POLICIES)
def test_choice(name: str, state: str, max_pages: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per KV head and row, rows of different lengths among them."""
    layer = in_state(state, routing=name, max_pages=max_pages, tier_cost=0.8)
    query = queries(layer)
    costs = _set_costs(layer, monkeypatch) if name == "cache_aware" else None
    choice = choose(layer, query)
    for row in range(len(layer.table.rows)):
        pages = full_pages(layer, row)
        protected = [page for page in pages if slow.is_protected(layer, page)]
        assert bool(protected) == (state in ("rebuilt, grown again", "lanes", "mixed widths", "cropped"))
        free = [page for page in pages if page not in protected]
        for head in range(layer.table.plain.keys.shape[0]):
            mine = chosen(layer, choice, row, head)
            assert {page.where for page in protected} <= mine
            own = slow.queries_of(layer, query, row, head)
            _assert_best(name, layer.config, mine - {page.where for page in protected}, pages, free, head, own, costs)


def _assert_best(
    name: str,
    config: PiKVConfig,
    mine: set[tuple[str, int]],
    pages: list[slow.Page],
    free: list[slow.Page],
    head: int,
    query: torch.Tensor,
    costs: Any,
) -> None:
    """Check that the free pages chosen are the best, as many as may be; which of equal ones is open."""
    most = slow.most_pages(config, len(free))
    if name == "adaptive":
        ranks: list[Any] = slow.estimated_shares(free, head, query)
        total, enough = 0.0, 0
        for share in sorted(ranks, reverse=True):
            if total < config.coverage:
                enough, total = enough + 1, total + share
        most = min(most, max(enough, math.ceil(most / 4)))
    elif name == "page_mass":
        ranks = slow.shares_by_codes(free, head, query, config.page_size)
    else:
        of_all = slow.ranks(name, pages, head, query, config, costs)
        ranks = [rank for page, rank in zip(pages, of_all, strict=True) if page in free]
    allowed = [rank for rank in ranks if rank is not None]
    read = [rank for page, rank in zip(free, ranks, strict=True) if page.where in mine]
    left = [rank for page, rank in zip(free, ranks, strict=True) if page.where not in mine and rank is not None]
    assert None not in read
    assert len(read) == len(mine) == min(most, len(allowed)) > 0
    assert min(read) >= max(left, default=min(read)) - 1e-5 * max(1, abs(min(read)))


def _set_costs(layer: PiKVLayer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that pages lie in tiers, some pools in fast memory alone."""
    costs, slow_pools = {}, {}
    for number, (name, pool) in enumerate(layer.table.pools.by_id().items()):
        if number != 1:
            costs[name] = torch.rand(pool.capacity).round(decimals=1)
            slow_pools[id(pool)] = costs[name]
    monkeypatch.setattr(routing_view, "tier_costs_of", lambda pool: slow_pools.get(id(pool)))
    monkeypatch.setattr(routing_view, "tier_costs_of", lambda pool: slow_pools.get(id(pool)))
    return lambda page: float(costs[page.where[0]][page.where[1]]) if page.where[0] in costs else 0.0


@pytest.mark.parametrize("coverage", [0.02, 0.4, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("state", ["padded", "rebuilt, grown again"])
def test_adaptive_stops_at_its_coverage(state: str, coverage: float) -> None:
    layer = in_state(state, routing="adaptive", coverage=coverage, max_pages=1.0)
    query = queries(layer)
    choice = choose(layer, query)
    numbers = set()
    for row in range(len(layer.table.rows)):
        pages = full_pages(layer, row)
        free = [page for page in pages if not slow.is_protected(layer, page)]
        for head in range(HEADS):
            mine = chosen(layer, choice, row, head) & {page.where for page in free}
            own = slow.queries_of(layer, query, row, head)
            _assert_best("adaptive", layer.config, mine, pages, free, head, own, None)
            numbers.add(len(mine))
    assert len(numbers) > 1 or coverage < 0.5


def test_equal_pages() -> None:
    """Ties are broken somehow, and as many pages are read as without them."""
    layer = slow.make_layer(routing="page_bound", max_pages=5)
    keys = torch.ones(1, HEADS, 100, KEY_DIM)
    got = layer.update(keys, torch.randn(1, HEADS, 100, VALUE_DIM))
    pikv_hf.integration.attention_function.pikv_attention_forward(
        slow.ATTENTION, torch.randn(1, HEADS * GROUPS, 100, KEY_DIM), *got, None
    )
    layer.record_experts(torch.randint(0, EXPERTS, (100,)))
    layer.settle()
    query = queries(layer)
    for name in POLICIES:
        layer.parts[0].page_router.policy = make_routing(PiKVConfig(routing=name, max_pages=5, coverage=0.9))
        for head in range(HEADS):
            assert len(chosen(layer, choose(layer, query), 0, head)) == 5


def test_shares_of_rows_of_different_lengths() -> None:
    layer = grown(padding=70, routing="page_bound", max_pages=0.25)
    choice = choose(layer, queries(layer))
    numbers = [len(chosen(layer, choice, row, 0)) for row in range(2)]
    held = [len(full_pages(layer, row)) for row in range(2)]
    assert numbers == [-(-count // 4) for count in held]
    assert numbers[0] < numbers[1]


@pytest.mark.parametrize("name", POLICIES)
def test_short_prompts_have_nothing_to_choose(name: str) -> None:
    layer = slow.make_layer(routing=name)
    grow(layer, 5)
    assert choose(layer, queries(layer)) is None
    empty_row = slow.make_layer(routing=name, max_pages=2)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, :55] = False
    grow(empty_row, 60, valid=valid)
    query = queries(empty_row)
    assert chosen(empty_row, choose(empty_row, query), 0, 0) == set()
    out, _ = attend(empty_row, query[:, :, None], scale=SCALE)
    assert torch.isfinite(out).all()
