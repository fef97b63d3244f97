"""Routing: what is chosen, against loops over pages; that it is read and nothing else; that bounds are bounds."""

import importlib.util
import math
from typing import Any

import pytest
import routing_reference as slow
import torch
from families import FAMILIES, prompts
from routing_reference import choose, chosen, dense_attention, full_pages, grow, grown
from test_layer_machine import EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM
from transformers import DynamicCache

import pikv_hf.attention.paged_attention
import pikv_hf.integration.attention_function
from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.attention.routed_attention import attend_choice
from pikv_hf.config import CODECS, ROUTINGS
from pikv_hf.integration.attention_function import attend
from pikv_hf.kernels.page_codes import BITS, spread_values
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.reports.memory_report import live_bytes
from pikv_hf.routing.policies import make_routing

SMALL = {"page_size": 8, "recent_window": 16, "num_shards": 4}
# Goes through the routed path and chooses every page.
EVERYTHING = {"routing": "adaptive", "coverage": 1.0, "max_pages": 1.0}
POLICIES = [name for name in ROUTINGS if name != "all"]


@pytest.fixture
def routed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the columns chosen in each routed step of a layer."""
    steps: list[int] = []

    def counting(index: Any, choice: Any, *rest: Any, **more: Any) -> Any:
        steps.append(choice.columns.shape[2])
        return attend_choice(index, choice, *rest, **more)

    monkeypatch.setattr(pikv_hf.attention.paged_attention, "attend_choice", counting)
    return steps


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> Any:
    fixed = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, past_key_values=cache, **{**fixed, **options})


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def queries(layer: PiKVLayer) -> torch.Tensor:
    return torch.randn(layer.batch, HEADS * GROUPS, KEY_DIM)


def kept_by_head(layer: PiKVLayer, share: float = 0.7) -> None:
    """Evict tokens, each head others; sinks and recent tokens stay."""
    kept = torch.rand(layer.batch, HEADS, layer.seen) < share
    kept[..., : layer.config.sink_tokens] = kept[..., -layer.config.recent_window :] = True
    layer.keep(kept)


# Everything chosen is exact


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_everything_chosen_is_exact(family: str, rows: int, routed_steps: list[int]) -> None:
    """Grouped queries, head dims that differ, attention sinks beside sliding layers; one row, and padded ones."""
    model = FAMILIES[family].build()
    model.set_attn_implementation("eager")
    expected = generate(model, prompts(rows), DynamicCache(config=model.config))
    assert_same(generate(model, prompts(rows), PiKVCache.for_model(model, **SMALL, **EVERYTHING)), expected)
    assert len(routed_steps) == 11 * (1 if family == "gpt_oss" else 3)
    assert min(routed_steps) >= 3
    detach(model)


def test_everything_chosen_by_beams_is_exact(routed_steps: list[int]) -> None:
    model = FAMILIES["qwen3_moe"].build()
    options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    expected = generate(model, prompts(), DynamicCache(config=model.config), **options)
    ours = generate(model, prompts(), PiKVCache.for_model(model, **SMALL, **EVERYTHING), **options)
    assert torch.equal(ours.sequences, expected.sequences)
    assert routed_steps


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_everything_chosen_with_codecs(codec: str, routed_steps: list[int]) -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    options = {**SMALL, "key_codec": codec, "value_codec": codec, "rank": 8}
    inputs = prompts(2, 140)
    expected = generate(model, inputs, PiKVCache.for_model(model, **options))
    assert not routed_steps
    cache = PiKVCache.for_model(model, **options, **EVERYTHING)
    assert_same(generate(model, inputs, cache), expected)
    assert routed_steps
    pools = cache.layers[0].table.index().pools
    assert len(pools) >= (2 if codec == "auto" else 1)
    assert set(pools) - {""}


@pytest.mark.parametrize("codec", ["none", "auto", "int4"])
@pytest.mark.parametrize("change", ["keep by head", "keep by head, then grow", "crop", "fork", "select"])
def test_everything_chosen_after_changes(change: str, codec: str, routed_steps: list[int]) -> None:
    layer = grown(padding=0 if "keep" in change else 40, key_codec=codec, value_codec=codec, **EVERYTHING)
    twin = layer.fork()
    if change.startswith("keep"):
        kept_by_head(layer)
    elif change == "crop":
        layer.crop(101)
    elif change == "select":
        layer.batch_select_indices(torch.tensor([1, 0, 1]))
    if change.endswith("grow") or change == "fork":
        for _ in range(9):
            grow(layer, 1)
    routed_steps.clear()
    for each in (layer, twin):
        router, query = each.router, queries(each)[:, :, None]
        routed = attend(each, query, scale=SCALE)
        each.router = None
        exact = attend(each, query, scale=SCALE)
        each.router = router
        for mine, other in zip(routed, exact, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert len(routed_steps) == 2


# What is chosen


@pytest.mark.parametrize("max_pages", [1, 7, 0.3])
@pytest.mark.parametrize(
    "state", ["uniform", "padded", "lanes", "packed", "mixed widths", "cropped", "rebuilt, grown again", "no window"]
)
@pytest.mark.parametrize("name", POLICIES)
def test_choice(name: str, state: str, max_pages: float) -> None:
    """Per KV head and row, rows of different lengths among them."""
    layer = _in_state(state, routing=name, max_pages=max_pages, tier_cost=0.8)
    query = queries(layer)
    costs = _set_costs(layer) if name == "cache_aware" else None
    choice = choose(layer, query)
    for row in range(len(layer.table.rows)):
        pages = full_pages(layer, row)
        protected = [page for page in pages if slow.is_protected(layer, page)]
        assert bool(protected) == (state in ("rebuilt, grown again", "lanes", "mixed widths", "cropped"))
        free = [page for page in pages if page not in protected]
        for head in range(layer.table.pool.keys.shape[0]):
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
    else:
        of_all = slow.ranks(name, pages, head, query, config, costs)
        ranks = [rank for page, rank in zip(pages, of_all, strict=True) if page in free]
    allowed = [rank for rank in ranks if rank is not None]
    read = [rank for page, rank in zip(free, ranks, strict=True) if page.where in mine]
    left = [rank for page, rank in zip(free, ranks, strict=True) if page.where not in mine and rank is not None]
    assert None not in read
    assert len(read) == len(mine) == min(most, len(allowed)) > 0
    assert min(read) >= max(left, default=min(read)) - 1e-5 * max(1, abs(min(read)))


def _in_state(state: str, **options: Any) -> PiKVLayer:
    if state == "packed":
        return grown(padding=40, key_codec="auto", value_codec="auto", error_budget=0.04, **options)
    if state == "no window":
        return grown(padding=20, recent_window=0, sink_tokens=0, **options)
    layer = grown(padding=60 if state == "padded" else 0, batch=3 if state == "padded" else 2, **options)
    if state == "lanes":
        kept_by_head(layer)
    elif state == "mixed widths":
        layer.keep(torch.tensor([0, 4, 8, 16])[torch.randint(0, 4, (2, HEADS, layer.seen))])
    elif state == "cropped":
        layer.crop(121)
    elif state == "rebuilt, grown again":
        layer.keys, layer.values = torch.randn(2, HEADS, 120, KEY_DIM), torch.randn(2, HEADS, 120, VALUE_DIM)
        for _ in range(30):
            grow(layer, 1)
    return layer


def _set_costs(layer: PiKVLayer) -> Any:
    """Pretend that pages lie in tiers, some pools in fast memory alone."""
    costs = {}
    for number, (name, pool) in enumerate(layer.table.pages.pools().items()):
        if number != 1:
            costs[name] = torch.rand(pool.capacity).round(decimals=1)
            pool.tier_costs = lambda name=name: costs[name]
    return lambda page: float(costs[page.where[0]][page.where[1]]) if page.where[0] in costs else 0.0


@pytest.mark.parametrize("coverage", [0.02, 0.4, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("state", ["padded", "rebuilt, grown again"])
def test_adaptive_stops_at_its_coverage(state: str, coverage: float) -> None:
    layer = _in_state(state, routing="adaptive", coverage=coverage, max_pages=1.0)
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
        layer.router.policy = make_routing(PiKVConfig(routing=name, max_pages=5, coverage=0.9))
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
    empty_row.vetted = True
    query = queries(empty_row)
    assert chosen(empty_row, choose(empty_row, query), 0, 0) == set()
    out, _ = attend(empty_row, query[:, :, None], scale=SCALE)
    assert torch.isfinite(out).all()


# What is read


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("state", ["padded", "lanes", "packed", "mixed widths", "cropped", "rebuilt, grown again"])
def test_a_step_reads_what_was_chosen_and_what_is_always_read(name: str, state: str) -> None:
    layer = _in_state(state, routing=name, max_pages=3, coverage=0.7)
    query = queries(layer)
    choice = choose(layer, query)
    out, _ = attend(layer, query[:, :, None], scale=SCALE)
    out = out.reshape(len(layer.table.rows), layer.table.pool.keys.shape[0], GROUPS, VALUE_DIM)
    for row in range(len(layer.table.rows)):
        pages, always = full_pages(layer, row), slow.always_read(layer, row)
        for head in range(out.shape[1]):
            mine = chosen(layer, choice, row, head)
            positions = always + [p for page in pages if page.where in mine for p in page.positions]
            held = set(always + [p for page in pages for p in page.positions])
            ends = [p for p in held if p < layer.config.sink_tokens or p >= layer.seen - layer.config.recent_window]
            assert set(ends) <= set(positions) < held
            expected = dense_attention(layer, query, row, head, positions)
            torch.testing.assert_close(out[row, head].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_model_with_few_pages_differs_from_one_with_all(routed_steps: list[int]) -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    exact = generate(model, prompts(2, 140), PiKVCache.for_model(model, **SMALL))
    few = generate(model, prompts(2, 140), PiKVCache.for_model(model, **SMALL, routing="page_bound", max_pages=2))
    assert set(routed_steps) == {2}
    # The first token comes from the prompt, which everything looks at.
    assert torch.equal(few.logits[0], exact.logits[0])
    assert not torch.equal(few.logits[1], exact.logits[1])


def test_several_new_tokens_read_everything(routed_steps: list[int]) -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    ids = torch.randint(3, 190, (1, 140))
    logits = []
    for options in ({}, {"routing": "page_bound", "max_pages": 1}):
        cache = PiKVCache.for_model(model, **SMALL, **options)
        with torch.no_grad():
            model(ids[:, :130], past_key_values=cache)
            logits.append(model(ids[:, 130:], past_key_values=cache).logits)
    assert torch.equal(*logits)
    assert not routed_steps


def test_nothing_of_other_rows_is_read() -> None:
    """A row that overflowed does not spoil the others, whose tables are filled up to its length."""
    layer = grown(padding=60, routing="page_bound", max_pages=0.5)
    query = queries(layer)
    before = attend(layer, query[:, :, None], scale=SCALE)[0]
    pages = layer.table.rows[1].full()
    layer.table.pool.values[:, pages], layer.table.pool.keys[:, pages] = torch.inf, torch.nan
    after = attend(layer, query[:, :, None], scale=SCALE)[0]
    assert torch.equal(after[0], before[0])
    assert not torch.isfinite(after[1]).all()


# Bounds


@pytest.mark.parametrize("codec", CODECS)
def test_bounds_bound_every_logit(codec: str) -> None:
    """After cropping, growing anew in the pages given back, forking and writing to shared pages."""
    layer = grown(prompt=130, batch=2, key_codec=codec, value_codec="none", rank=4, routing="page_bound", max_pages=3)
    for each in _lives(layer):
        query = queries(each)
        bounds = each.table.index().bounds(query).double()
        for row in range(2):
            columns = each.table.index().pages[row].tolist()
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
    index = layer.table.index()
    part = index.columns[page.where[0]]
    return part.start + index.pages[row, part].tolist().index(page.where[1])


def _slack(layer: PiKVLayer, page: slow.Page, head: int, own: torch.Tensor) -> float:
    """Return how far decoded keys may lie beyond bounds: half a step of the codes, in channels that carry more bits.

    Keys that are not packed, or whose bounds were taken from what they are decoded to, may not.
    """
    pool = layer.table.pages.pools()[page.where[0]]
    codes = getattr(pool, "keys", None)
    if not page.where[0] or codes.kind not in BITS or codes.latent is not None:
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
        layers.append(grown(routing=name, max_pages=4))
        attend(layers[-1], queries(layers[-1])[:, :, None], scale=SCALE)
    every, routed = layers
    assert every.table.pool.bounds is None
    extra = live_bytes(routed.table.pool.tensors()) - live_bytes(every.table.pool.tensors())
    assert extra == live_bytes([routed.table.pool.bounds.ends]) == routed.table.pool.capacity * HEADS * 2 * KEY_DIM * 4


def test_the_report_counts_bounds() -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    reports = {}
    for name in ("all", "page_bound"):
        cache = PiKVCache.for_model(model, **SMALL, routing=name, max_pages=4)
        generate(model, prompts(1, 140), cache)
        reports[name] = cache.memory_report()
        ends = [layer.table.pool.bounds for layer in cache.layers]
        assert [bounds is None for bounds in ends] == [name == "all"]
    assert reports["page_bound"].keys == reports["all"].keys
    added = sum(live_bytes(bounds.tensors()) + bounds.host_bytes for bounds in ends)
    assert reports["page_bound"].total >= reports["all"].total + added > reports["all"].total


def test_integer_codes_are_their_own_bounds() -> None:
    layer = grown(prompt=180, key_codec="int4", value_codec="int4", routing="page_bound", max_pages=3)
    choose(layer, queries(layer))
    assert "int4" in layer.table.index().pools
    assert layer.table.pages.sealed["int4"].bounds is None


# Triton


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("name", ["page_bound", "adaptive"])
def test_in_the_interpreter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and attention of one launch each, with rows of different lengths and packed pages."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    options = {"page_size": 16, "recent_window": 16, "num_shards": 2, "key_codec": "int4", "value_codec": "int8"}
    inputs, step = prompts(2, 110), torch.randint(3, 190, (2, 1))
    seen = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    logits, columns = {}, {}
    for backend in ("torch", "interpret"):
        # Packed by the same kernel both times.
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        cache = PiKVCache.for_model(model, **options, routing=name, max_pages=2, coverage=0.8)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            monkeypatch.setenv("PIKV_KERNELS", backend)
            logits[backend] = model(step, attention_mask=seen, past_key_values=cache).logits
        (layer,) = cache.layers
        assert len(layer.table.index().lengths["int4/int8"].unique()) == 2
        query = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
        columns[backend] = layer.router.choose(layer.table.index(), query, 0.25, layer.seen).columns
    assert torch.equal(columns["torch"], columns["interpret"])
    torch.testing.assert_close(logits["interpret"], logits["torch"], atol=1e-4, rtol=1e-4)
