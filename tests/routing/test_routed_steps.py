"""Routed steps: exact where every page is chosen, and else nothing is read but what was chosen."""

import importlib.util

import pytest
import routing_reference as slow
import torch
from fake_attachment import GROUPS, SCALE, VALUE_DIM
from families import FAMILIES, prompts
from routing_reference import choose, chosen, dense_attention, full_pages, grow, grown
from routing_runs import EVERYTHING, POLICIES, SMALL, assert_same, generate, in_state, kept_by_head, queries
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.config import CODECS
from pikv_hf.layer.attend import attend
from pikv_hf.pages.pool_id import PLAIN, PoolId

pytestmark = pytest.mark.slow

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
    options = {**SMALL, "key_codec": codec, "value_codec": codec, "rank": 8, "error_budget": 0.2}
    inputs = prompts(2, 140)
    expected = generate(model, inputs, PiKVCache.for_model(model, **options))
    assert not routed_steps
    cache = PiKVCache.for_model(model, **options, **EVERYTHING)
    assert_same(generate(model, inputs, cache), expected)
    assert routed_steps
    pools = cache.layers[0].table.view.full_pages().pools
    assert len(pools) >= (2 if codec == "auto" else 1)
    assert set(pools) - {PLAIN}


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
        part, query = each.parts[0], queries(each)[:, :, None]
        router = part.page_router
        routed = attend(each, query, scale=SCALE)
        part.page_router = None
        exact = attend(each, query, scale=SCALE)
        part.page_router = router
        for mine, other in zip(routed, exact, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert len(routed_steps) == 2


# What is read


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("state", ["padded", "lanes", "packed", "mixed widths", "cropped", "rebuilt, grown again"])
def test_a_step_reads_what_was_chosen_and_what_is_always_read(name: str, state: str) -> None:
    layer = in_state(state, routing=name, max_pages=3, coverage=0.7)
    query = queries(layer)
    choice = choose(layer, query)
    out, _ = attend(layer, query[:, :, None], scale=SCALE)
    out = out.reshape(len(layer.table.rows), layer.table.plain.keys.shape[0], GROUPS, VALUE_DIM)
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
    pages = layer.table.rows[1].full_pages()
    layer.table.plain.values[:, pages], layer.table.plain.keys[:, pages] = torch.inf, torch.nan
    after = attend(layer, query[:, :, None], scale=SCALE)[0]
    assert torch.equal(after[0], before[0])
    assert not torch.isfinite(after[1]).all()


# Triton


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("name", ["page_bound", "adaptive", "page_mass"])
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
        assert len(layer.table.view.full_pages().lengths[PoolId.parse("int4/int8")].unique()) == 2
        query = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
        columns[backend] = (
            layer.parts[0].page_router.choose(layer.table.view.full_pages(), query, 0.25, layer.seen).columns
        )
    assert torch.equal(columns["torch"], columns["interpret"])
    torch.testing.assert_close(logits["interpret"], logits["torch"], atol=1e-4, rtol=1e-4)
