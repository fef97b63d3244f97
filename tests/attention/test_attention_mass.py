"""What scheduling is told of each page: its share of attention, when it was used, and how old it is."""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from attention_mass_reference import (
    SMALL,
    Page,
    assert_close,
    by_head,
    by_kv_head,
    causal_mask,
    gained,
    grow,
    grown,
    make_layer,
    pages_of,
    parted,
    recorded,
    share_by_head,
    share_by_head_and_query,
    shares_of,
    total,
    weights,
)
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.attention.attention_mass import OBSERVED
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.attend import attend
from pikv_hf.pages.pool_id import PoolId
from pikv_hf.pages.usage_counters import ATTENTION_HALF_LIFE

CASES: dict[str, Any] = {
    "runs": lambda: grown(num_shards=1, batch=1),
    "scattered": lambda: grown(batch=3),
    "no window": lambda: grown(recent_window=0, sink_tokens=0),
    "padding": lambda: grown(batch=3, padding=31),
    "packed": lambda: grown(key_codec="int4", value_codec="int8"),
    "several pools": lambda: grown(key_codec="auto", value_codec="auto", error_budget=0.3),
    "low rank": lambda: grown(key_codec="lowrank", value_codec="lowrank+int4", rank=4),
    "shared rows": lambda: parted(grown()),
    "shared and packed": lambda: parted(grown(key_codec="int8", value_codec="int8")),
    "lanes": lambda: by_head(grown()),
    "lanes of packed pages": lambda: by_head(grown(key_codec="int4", value_codec="int4")),
    "a policy of lanes": lambda: grown(scheduler="ada_kv"),
    "bounds": lambda: grown(scheduler="quest", key_codec="int4"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_decoding_step_credits_pages_with_their_softmax(case: str) -> None:
    layer = CASES[case]()
    query = torch.randn(layer.batch, HEADS * GROUPS, 1, KEY_DIM)
    before = recorded(layer)
    attend(layer, query, scale=SCALE)
    expected = shares_of(layer, by_kv_head(weights(layer, query)))
    assert_close(gained(before, recorded(layer)), expected)
    rows = len(layer.table.rows) / layer.store.lanes
    assert sum(expected.values()) == pytest.approx(rows * layer.store.lanes)


@pytest.mark.parametrize("case", ["runs", "padding", "packed", "shared rows", "lanes", "a policy of lanes"])
@pytest.mark.parametrize("new", [5, 45])
def test_a_chunk_credits_pages_with_the_mean_over_its_queries(case: str, new: int) -> None:
    """And its own tokens with what its newest queries give them, wherever they are stored then."""
    layer = CASES[case]()
    valid = layer.stored_mask().any(dim=1)
    mask = None if bool(valid.all()) else torch.cat([valid, torch.ones(layer.batch, new, dtype=torch.bool)], dim=1)
    before = recorded(layer)
    keys, values = torch.randn(layer.batch, HEADS, new, KEY_DIM), torch.randn(layer.batch, HEADS, new, VALUE_DIM)
    query = torch.randn(layer.batch, HEADS * GROUPS, new, KEY_DIM)
    got = layer.update(keys, values)
    visible = None if mask is None else causal_mask(mask, new)
    pikv_attention_forward(ATTENTION, query, *got, visible, scaling=SCALE)
    every = weights(layer, query)
    mean = by_kv_head(every)
    assert_close(gained(before, recorded(layer)), shares_of(layer, mean))
    newest = by_kv_head(every[:, :, -OBSERVED:])[:, :, -new:]
    torch.testing.assert_close(layer.pending.masses.double(), newest, atol=2e-6, rtol=1e-5)
    layer.record_experts(torch.randint(0, EXPERTS, (layer.batch * new,)))
    if case != "shared rows":
        # A page that rows no longer share is copied with all that it ever took.
        everything = sum(recorded(layer).values()) - sum(before.values())
        expected = float((mean[:, :, :-new].sum() + newest.sum()) / HEADS * layer.store.lanes)
        assert everything == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("padding", [0, 23])
@pytest.mark.parametrize("options", [{}, {"key_codec": "int4"}, {"scheduler": "duo"}, {"recent_window": 0}])
def test_a_prompt_credits_its_pages_with_what_its_newest_queries_see(padding: int, options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[0, :padding] = False
    # From before packing, so that keys are those that attention has met.
    keys, values = torch.randn(2, HEADS, 70, KEY_DIM), torch.randn(2, HEADS, 70, VALUE_DIM)
    query = torch.randn(2, HEADS * GROUPS, 70, KEY_DIM)
    got = layer.update(keys, values)
    pikv_attention_forward(ATTENTION, query, *got, causal_mask(valid if padding else None, 70), scaling=SCALE)
    newest = by_kv_head(weights(layer, query)[:, :, -OBSERVED:])
    layer.record_experts(torch.randint(0, EXPERTS, (140,)))
    assert_close(recorded(layer), shares_of(layer, newest))


@pytest.mark.parametrize("history", [False, True])
def test_attention_sinks_and_soft_caps_lessen_shares(history: bool) -> None:
    """The share is that of the weights that values are given: what sinks take goes to no page."""
    layer, sinks, softcap = make_layer(), torch.randn(HEADS * GROUPS) + 4, 1.5
    if history:
        layer = grown()
    before = recorded(layer) if history else {}
    query = torch.randn(2, HEADS * GROUPS, 9, KEY_DIM)
    got = layer.update(torch.randn(2, HEADS, 9, KEY_DIM), torch.randn(2, HEADS, 9, VALUE_DIM))
    pikv_attention_forward(ATTENTION, query, *got, None, scaling=SCALE, s_aux=sinks, softcap=softcap)
    mean = by_kv_head(weights(layer, query, softcap=softcap, sinks=sinks))
    assert float(mean.sum(2).max()) < 0.9
    if history:
        assert_close(gained(before, recorded(layer)), shares_of(layer, mean))
    torch.testing.assert_close(layer.pending.masses.double(), mean[:, :, -9:], atol=2e-6, rtol=1e-5)
    layer.record_experts(torch.randint(0, EXPERTS, (18,)))
    before, query = recorded(layer), torch.randn(2, HEADS * GROUPS, 1, KEY_DIM)
    got = layer.update(torch.randn(2, HEADS, 1, KEY_DIM), torch.randn(2, HEADS, 1, VALUE_DIM))
    new_pages = {page: 0.0 for page in recorded(layer) if page not in before}
    pikv_attention_forward(ATTENTION, query, *got, None, scaling=SCALE, s_aux=sinks, softcap=softcap)
    expected = shares_of(layer, by_kv_head(weights(layer, query, softcap=softcap, sinks=sinks)))
    assert_close(gained({**before, **new_pages}, recorded(layer)), expected)


@pytest.mark.parametrize("options", [{}, {"key_codec": "int4", "value_codec": "int8"}])
def test_a_routed_step_credits_what_it_reads(options: dict[str, Any]) -> None:
    """Pages that were not read gain nothing; the others share all of the attention as softmax over them does."""
    layer = by_head(grown(prompt=90, routing="page_bound", max_pages=3, **options))
    query = torch.randn(layer.batch, HEADS * GROUPS, 1, KEY_DIM)
    before = recorded(layer)
    attend(layer, query, scale=SCALE)
    found = gained(before, recorded(layer))
    full = share_by_head(layer, by_kv_head(weights(layer, query)))
    of_queries = share_by_head_and_query(layer, weights(layer, query))
    for row in range(len(layer.table.rows)):
        mine = [page for r, page in pages_of(layer) if r == row]
        read = [page for page in mine if found[page] > 0]
        assert 3 <= len(read) < len(mine)
        assert sum(found[page] for page in read) == pytest.approx(1, abs=1e-5)
        for page in read:
            parts = [each[page] / sum(each[p] for p in read) for each in of_queries[row]]
            assert found[page] == pytest.approx(float(np.mean(parts)), abs=1e-5)
            assert full[row, page][0] < found[page]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("case", ["padding", "shared rows", "lanes", "routed"])
def test_the_kernels_agree_with_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    backend = "triton" if torch.cuda.is_available() else "interpret"
    for name in ("torch", backend):
        torch.manual_seed(7)
        # Packed by the same kernel both times.
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        layer = grown(prompt=90, routing="page_bound", max_pages=3) if case == "routed" else CASES[case]()
        query = torch.randn(layer.batch, HEADS * GROUPS, 1, KEY_DIM)
        monkeypatch.setenv("PIKV_KERNELS", name)
        attend(layer, query, scale=SCALE)
        usages = [pool.usage for pool in layer.table.pools.by_id().values()]
        found[name] = torch.cat([usage.shares for usage in usages], 1), torch.cat([u.steps for u in usages], 1)
    torch.testing.assert_close(found[backend][0], found["torch"][0], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[backend][1], found["torch"][1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_agree_on_packed_pages_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with attention sinks; the kernels take packed heads of 16 channels and more."""
    model = FAMILIES["gpt_oss"].build(num_hidden_layers=1, layer_types=["full_attention"])
    ids, found = torch.randint(3, 190, (2, 90)), {}
    options = {**SMALL, "page_size": 16, "key_codec": "int4", "value_codec": "int8", "scheduler": "quest"}
    backend = "triton" if torch.cuda.is_available() else "interpret"
    for name in ("torch", backend):
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        cache = PiKVCache.for_model(model, **options)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            monkeypatch.setenv("PIKV_KERNELS", name)
            for step in range(3):
                model(ids[:, step : step + 1], past_key_values=cache)
        found[name] = [pool.usage.shares for pool in cache.layers[0].table.pools.by_id().values()]
    assert len(found["torch"]) == 2
    for ours, theirs in zip(found[backend], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", ["runs", "scattered", "several pools", "shared rows", "lanes"])
def test_what_is_known_of_use_follows_a_slow_reference(case: str) -> None:
    """A page is used in a step if one of its KV heads gives it an equal share at least."""
    layer = CASES[case]()
    usage = {name: pool.usage for name, pool in layer.table.pools.by_id().items()}
    steps = {page: usage[page[0]].steps[:, page[1]].tolist() for _, page in pages_of(layer)}
    uses: dict[Page, list[int]] = {page: [] for page in steps}
    recent, start = recorded(layer, 1), layer.parts[0].scheduler.now
    for step in range(start + 1, start + 25):
        query = 2 * torch.randn(layer.batch, HEADS * GROUPS, 1, KEY_DIM)
        attend(layer, query, scale=SCALE)
        of_tokens = by_kv_head(weights(layer, query))
        read = {row: sum(r == row for r, _ in pages_of(layer)) for row in range(len(layer.table.rows))}
        for (row, page), heads in share_by_head(layer, of_tokens).items():
            if max(heads) >= 1 / read[row] and step not in uses[page]:
                uses[page].append(step)
        shares = shares_of(layer, of_tokens)
        recent = {page: recent[page] * 0.5 ** (1 / ATTENTION_HALF_LIFE) + shares[page] for page in recent}
    assert_close(recorded(layer, 1), recent, 1e-4)
    for page, (born, last, previous, count) in steps.items():
        times = [previous, last][max(0, 2 - count) :] + uses[page]
        expected = [born, times[-1] if times else last, times[-2] if len(times) > 1 else -1, count + len(uses[page])]
        assert usage[page[0]].steps[:, page[1]].tolist() == expected, page
    assert layer.parts[0].scheduler.now == start + 24
    assert any(uses.values())
    assert not all(len(times) == 24 for times in uses.values())


@pytest.mark.parametrize("codec", ["none", "int4", "auto"])
def test_tokens_take_their_mass_from_the_window_to_shards_and_when_packed(codec: str) -> None:
    layer = make_layer(key_codec=codec, value_codec=codec, recent_window=5)
    grow(layer, 40)
    expected = 0.0
    for _ in range(30):
        layer.settle()
        before = total(layer)
        grow(layer, 1)
        expected = before + 2
        assert total(layer) == pytest.approx(expected, abs=1e-4)
    layer.settle()
    assert total(layer) == pytest.approx(expected, abs=1e-4)
    if codec == "int4":
        assert any(layer.table.pools.packed[PoolId.parse("int4")].allocator.refcount)


def test_a_page_is_as_old_as_its_tokens_are_on_average() -> None:
    """The mass that tokens bring from the window took as many steps as they were there."""
    layer = make_layer(num_shards=1, sink_tokens=0, recent_window=12)
    grow(layer, 4, 1)
    births = {}
    for _ in range(40):
        grow(layer, 1, 1)
        pool = layer.table.plain
        for page in layer.table.rows[0].window:
            births[int(pool.positions[page, 0])] = int(pool.usage.steps[0, page])
    layer.settle()
    (row,) = layer.table.rows
    assert len(row.full) >= 6
    for page in row.full:
        born, last = layer.table.plain.usage.steps[:2, page].tolist()
        assert born == births[int(layer.table.plain.positions[page, 0])]
        # Being filled counts as a use.
        assert last >= born + 12


def test_tokens_of_several_times_make_a_page_of_their_mean_age() -> None:
    from pikv_hf.pages.usage_counters import UsageCounters

    usage = UsageCounters(torch.device("cpu")).resized(4, np.arange(0), 0)
    for page, now in ((0, 10), (1, 20), (2, 40)):
        usage.now = now
        usage.reset(np.array([page]))
    usage.add(torch.tensor([0, 1]), torch.tensor([4.0, 8.0]))
    into = torch.full((3,), 2)
    usage.move_tokens(torch.tensor([0, 0, 0]), into, 4, torch.full((3,), 3))
    assert usage.steps[:2, 2].tolist() == [10, 40]
    usage.move_tokens(torch.tensor([1]), into[:1], 4, torch.full((1,), 4))
    assert usage.steps[0, 2] == round((3 * 10 + 20) / 4)
    assert usage.shares[:, 2].tolist() == [5.0, 5.0]


def test_pages_of_a_call_have_been_seen_by_it() -> None:
    """A policy that compares shares per step need not wait for the next step to know a prompt's pages."""
    layer = make_layer()
    grow(layer, 60)
    pages = [page for _, page in pages_of(layer)]
    assert layer.parts[0].scheduler.now == 1
    assert all(layer.table.pools.by_id()[name].usage.steps[0, page] == 0 for name, page in pages)
    grow(layer, 20)
    born = {int(layer.table.pools.by_id()[name].usage.steps[0, page]) for _, (name, page) in pages_of(layer)}
    assert layer.parts[0].scheduler.now == 2
    assert born == {0, 1}


def test_forks_share_the_count_of_steps() -> None:
    """They share pages, whose last use must not lie ahead of one of them."""
    layer = grown()
    twin = layer.fork()
    for _ in range(5):
        grow(layer, 1)
    recent = recorded(twin, 1)
    query = torch.randn(2, HEADS * GROUPS, 1, KEY_DIM)
    attend(twin, query, scale=SCALE)
    assert twin.parts[0].scheduler.now == layer.parts[0].scheduler.now + 1
    shares = shares_of(twin, by_kv_head(weights(twin, query)))
    decay = 0.5 ** (1 / ATTENTION_HALF_LIFE)
    assert_close(recorded(twin, 1), {page: recent[page] * decay + shares[page] for page in recent}, 1e-5)
