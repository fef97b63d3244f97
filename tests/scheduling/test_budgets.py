"""Budgets of a cache hold after every update, and cost nothing while they are not reached."""

import gc
from typing import Any

import pytest
import torch
from budget_runs import LEAST, check, decode, gave_way, make_cache, paged_layers, run, shared_model
from press_runs import ids_of, padded, read
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from pikv_hf.config import JOINT, SCHEDULERS
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer

pytestmark = pytest.mark.slow

BUDGETS: list[tuple[Any, str | None]] = [
    (56, None),
    (LEAST, "layer"),
    (2 * 48, "cache"),
    (0.3, None),
    ("160KB", "cache"),
    ("80KB", "layer"),
    (12, "shard"),
    (0.4, "shard"),
    ("20KB", "shard"),
]
CODECS = ("none", "int4", "auto", "fp8", "lowrank")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("budget", "scope"), BUDGETS)
def test_a_budget_holds_after_every_update(budget: Any, scope: str | None, scheduler: str) -> None:
    """Every scheduler with every kind of budget, each with another codec, in one call or in chunks, batched."""
    model = shared_model()
    number = BUDGETS.index((budget, scope)) + SCHEDULERS.index(scheduler)
    prompt = 400 if isinstance(budget, str) and scope != "shard" else 90
    codec, chunk = CODECS[number % len(CODECS)], (prompt // 4, prompt)[number % 2]
    options = {"key_codec": codec, "value_codec": codec, "rank": 4}
    cache = make_cache(model, budget=budget, budget_scope=scope, scheduler=scheduler, **options)
    run(model, cache, ids_of(prompt + 9, batch=2), prompt, chunk)
    assert all(layer.parts[0].scheduler.tokens_evicted > 0 for layer in paged_layers(cache))
    assert cache.get_seq_length() == prompt + 9


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("budget", "scope"), [(64, None), (0.35, None), ("140KB", None), (12, "shard")])
def test_a_budget_holds_with_every_codec(budget: Any, scope: str | None, codec: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, budget_scope=scope, key_codec=codec, value_codec=codec, rank=4)
    run(model, cache, ids_of(270, batch=2), 255, 255)
    assert all(map(gave_way, paged_layers(cache)))


@pytest.mark.parametrize(("budget", "codec"), [(LEAST, "none"), ("76KB", "none"), ("82KB", "int4"), (0.4, "int4")])
def test_bounded_sliding_layers_count(budget: Any, codec: str) -> None:
    model = shared_model("gpt_oss")
    cache = make_cache(model, budget=budget, key_codec=codec, value_codec=codec)
    assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    run(model, cache, ids_of(135, batch=2), 110, 55)
    assert all(map(gave_way, paged_layers(cache)))


@pytest.mark.parametrize(("budget", "scheduler"), [(56, "h2o"), ("82KB", "quest"), (0.4, "ada_kv")])
def test_a_budget_holds_with_routing(budget: Any, scheduler: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, scheduler=scheduler, routing="page_bound", max_pages=2, key_codec="int4")
    run(model, cache, ids_of(115), 90, 45)
    assert all(layer.parts[0].scheduler.tokens_evicted > 0 for layer in paged_layers(cache))


@pytest.mark.parametrize("scheduler", ["pikv", JOINT])
@pytest.mark.parametrize("budget", [56, "70KB"])
def test_every_token_is_counted_where_pages_have_to_go_for_it(budget: Any, scheduler: str) -> None:
    model, ids = shared_model(), ids_of(115)
    cache = make_cache(model, budget=budget, scheduler=scheduler)
    with torch.no_grad():
        model(ids[:, :90], past_key_values=cache)
        for seen in range(90, 115):
            model(ids[:, seen : seen + 1], past_key_values=cache)
            assert [layer.seen for layer in paged_layers(cache)] == [seen + 1] * len(paged_layers(cache))
    assert all(map(gave_way, paged_layers(cache)))


@pytest.mark.parametrize("budget", [56, 0.3, "220KB"])
def test_a_budget_holds_in_padded_batches(budget: Any) -> None:
    model = shared_model()
    _, ids, mask = padded([90, 41])
    cache = make_cache(model, budget=budget, placement="hash")
    read(model, cache, ids, mask=mask)
    check(cache)
    for step in range(30):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            model(ids[:, step : step + 1], past_key_values=cache, attention_mask=mask)
        check(cache)
    assert cache.layers[0].store.padding() == [0, 49]


@pytest.mark.parametrize("budget", [56, 0.3, "270KB"])
@pytest.mark.parametrize("beams", [3])
def test_a_budget_holds_in_beam_search(budget: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget)
    seen, reorder = [], cache.reorder_cache

    def watched(order: torch.Tensor) -> None:
        check(cache)
        reorder(order)
        check(cache)
        seen.append(order)

    monkeypatch.setattr(cache, "reorder_cache", watched)
    out = model.generate(ids_of(80), past_key_values=cache, num_beams=beams, max_new_tokens=30, do_sample=False)
    assert out.shape == (1, 110)
    assert len(seen) > 20


@pytest.mark.parametrize("budget", [56, "70KB"])
def test_forks_keep_to_their_budgets(budget: Any) -> None:
    """Each brings one of its own. Once it is gone, the others are within theirs after their next page."""
    model = shared_model()
    cache = make_cache(model, budget=budget)
    ids = ids_of(150)
    run(model, cache, ids[:, :100], 80, 80)
    forks = [cache.fork() for _ in range(2)]
    for number, fork in enumerate(forks):
        logits = decode(model, fork, ids[:, 100 + number : 130])
        assert torch.isfinite(logits).all()
        check(fork, forks=3)
    before = cache.layers[0].stored_mask()
    del fork, forks
    gc.collect()
    assert torch.equal(cache.layers[0].stored_mask(), before)
    decode(model, cache, ids[:, 100:109])
    check(cache)


def test_a_fork_evicts_nothing_that_makes_no_room() -> None:
    """Pages that another cache holds are not given up for bytes that they would not free."""
    model = shared_model()
    cache = make_cache(model, budget="75KB")
    run(model, cache, ids_of(100), 80, 80)
    fork = cache.fork()
    before = fork.layers[0].stored_mask()
    decode(model, fork, ids_of(10, seed=3))
    assert torch.equal(fork.layers[0].stored_mask()[:, :, :100], before)


@pytest.mark.parametrize("budget", [4096, "100MB"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_budget_that_is_not_reached_changes_nothing(budget: Any, family: str) -> None:
    model = shared_model(family)
    _, ids, mask = padded([70, 33])
    options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    cache = make_cache(model, budget=budget)
    ours = model.generate(ids, past_key_values=cache, **options)
    theirs = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(ours, theirs)
    assert all(layer.parts[0].scheduler.pages_evicted == 0 for layer in paged_layers(cache))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_attention_is_that_over_what_is_held(scheduler: str) -> None:
    """An evicted token never takes part again; sinks and the recent window never go."""
    model = shared_model()
    cache = make_cache(model, budget=56, scheduler=scheduler)
    gone = [torch.zeros(2, 2, 0, dtype=torch.bool)] * 2
    for part in (*ids_of(90, batch=2).split(30, dim=1), *ids_of(40, batch=2, seed=2).split(1, dim=1)):
        with torch.no_grad():
            model(part, past_key_values=cache)
        cache.memory_report()
        for index, layer in enumerate(cache.layers):
            there = layer.stored_mask()
            assert not bool((there[:, :, : gone[index].shape[2]] & gone[index]).any())
            gone[index] = ~there
            assert bool(there[:, :, :4].all())
            assert bool(there[:, :, -16:].all())
    for layer in cache.layers:
        query = torch.randn(2, 4, 1, 16)
        keys, values = (part.repeat_interleave(2, dim=1) for part in layer.dense())
        hidden = ~layer.stored_mask().repeat_interleave(2, dim=1)[:, :, None]
        assert float(hidden.float().mean()) > 0.3
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=~hidden)
        torch.testing.assert_close(attend(layer, query)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ada_kv", "duo"])
def test_heads_keep_different_tokens(scheduler: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=64, scheduler=scheduler)
    run(model, cache, ids_of(160), 90, 30)
    assert any(not torch.equal(layer.stored_mask()[:, 0], layer.stored_mask()[:, 1]) for layer in cache.layers)


@pytest.mark.parametrize("capacity", [16, 20, 33])
def test_lru_without_uses_is_a_circular_buffer_per_shard(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiKV's shards of capacity S: the newest S tokens of each, as whole pages."""
    monkeypatch.setattr("pikv_hf.pages.usage_counters.UsageCounters.use", lambda self, index, hit: None)
    model = shared_model()
    cache = make_cache(model, budget=capacity, budget_scope="shard", scheduler="lru")
    layer, ids = cache.layers[0], ids_of(190)
    came: list[list[int]] = [[] for _ in range(3)]
    for part in (*ids[:, :60].split(30, dim=1), *ids[:, 60:].split(1, dim=1)):
        experts = shards_of_the_window(layer)
        with torch.no_grad():
            model(part, past_key_values=cache)
        cache.memory_report()
        for shard, there in enumerate(by_shard(layer)):
            came[shard] = sorted({*came[shard], *there, *(at for at, to in experts.items() if to == shard)})
            window = set(shards_of_the_window(layer))
            every = [at for at in came[shard] if at not in window]
            assert len(there) <= capacity
            assert there == every[len(every) - len(there) :], shard
            # Nothing goes that need not: with the page that went last there were too many.
            assert len(there) == len(every) or len(there) + 8 > capacity
    assert layer.parts[0].scheduler.tokens_evicted > 60


def shards_of_the_window(layer: PiKVLayer) -> dict[int, int]:
    """Return where the tokens of the recent window will go, by position."""
    if layer.table is None:
        return {}
    writer, (row,) = layer.table.writer, layer.table.rows
    pool, found = layer.table.plain, {}
    for page in row.window[writer.sink_pages :]:
        positions = pool.positions[page, : pool.count[page]].tolist()
        found |= dict(zip(positions, writer.page_shards(page).tolist(), strict=True))
    return found


def by_shard(layer: PiKVLayer) -> list[list[int]]:
    """Return the positions of the tokens in each shard of a layer of one sequence, sorted."""
    found: list[list[int]] = [[] for _ in range(layer.table.num_shards)]
    (row,) = layer.table.rows
    for name, pool in layer.table.pools.by_id().items():
        for page in row.pages(name):
            if pool.shard[page] >= 0:
                found[pool.shard[page]] += [at for at in pool.positions[page].tolist() if at >= 0]
    return [sorted(positions) for positions in found]
