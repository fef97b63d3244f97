"""Budgets and tiers of caches on several devices, and a device that has no memory left."""

from typing import Any

import numpy as np
import pytest
import torch
from device_runs import assert_spread, paged_layers, shared_model, single_layer, spread
from exact_runs import assert_same, generate, reference
from failing_memory import no_memory_for
from families import prompts
from press_runs import ids_of, next_logits, read

from pikv_hf import PiKVCache
from pikv_hf.config import SCHEDULERS
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.growth_limit import BudgetError

pytestmark = pytest.mark.slow

# Budgets

BUDGETS: list[tuple[Any, str | None]] = [
    (104, None),
    (88, "layer"),
    (2 * 96, "cache"),
    (0.35, None),
    ("230KB", "cache"),
    ("115KB", "layer"),
    (12, "shard"),
    (0.4, "shard"),
    ("10KB", "shard"),
]


def check(cache: PiKVCache) -> None:
    """Every limit of the cache holds, over all parts: each token counts once, the window too."""
    options, layers, report = cache.pikv_config, paged_layers(cache), cache.memory_report()
    budget, scope, number = options.budget, options.budget_scope, layers[0].layout.parts
    if isinstance(budget, str):
        amount = int(float(budget.removesuffix("KB")) * 1000)
        if scope == "cache":
            assert cache.nbytes <= amount
        for index, layer in enumerate(layers):
            parts = [each for each in report.layers if each.layer == index]
            assert len(parts) == number
            if scope == "layer":
                assert sum(part.total for part in parts) <= amount
            elif scope == "shard":
                page = layer.table.plain.full_page_bytes * len(layer.table.rows)
                assert shard_tokens(layer).max() <= amount // page * layer.table.plain.page_size
            most = amount / number if scope == "layer" else amount / number / len(layers)
            assert scope == "shard" or all(part.total <= most for part in parts)
        return
    for layer in layers:
        most = budget if isinstance(budget, int) else int(budget * layer.seen)
        held = float(layer.stored_mask().sum(2).float().mean(1).max())
        least = 8 + options.recent_window + 2 * options.page_size * number
        if scope == "shard":
            assert shard_tokens(layer).max() <= (most if isinstance(budget, int) else most // layer.table.num_shards)
        elif scope == "cache" and isinstance(budget, int):
            assert held <= budget / len(layers)
        else:
            assert held <= (most if isinstance(budget, int) else max(most, least))


def shard_tokens(layer: PiKVLayer) -> np.ndarray:
    """Return the tokens that each sequence holds in each shard, wherever that is, means over KV heads, `(B, S)`."""
    held = np.zeros((len(layer.table.rows), layer.table.num_shards))
    for table in layer.store.tables():
        for name, pool in table.pools.by_id().items():
            for row, sequence in enumerate(table.rows):
                pages = sequence.pages(name)
                np.add.at(
                    held[row], pool.shard[pages[pool.shard[pages] >= 0]], pool.count[pages[pool.shard[pages] >= 0]]
                )
    return held.reshape(layer.batch, -1, layer.table.num_shards).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("turn", range(2))
def test_a_budget_holds_after_every_update(turn: int, scheduler: str) -> None:
    """Every scheduler with two kinds of budget, every kind with two, codecs and numbers of devices in turn."""
    number = SCHEDULERS.index(scheduler)
    budget, scope = BUDGETS[(number + 4 * turn) % len(BUDGETS)]
    model = shared_model() if scope == "cache" else single_layer()
    in_bytes = isinstance(budget, str) and scope != "shard"
    codec = "none" if in_bytes else ("none", "int4", "auto", "fp8", "lowrank")[(number + turn) % 5]
    prompt, devices = 480 if in_bytes else 160, 2 if in_bytes else 2 + (number + turn) % 2
    chunk = (prompt // 4, prompt)[(number + turn) % 2]
    options = {"key_codec": codec, "value_codec": codec, "rank": 4, "num_shards": 3}
    cache = spread(model, devices, budget=budget, budget_scope=scope, scheduler=scheduler, **options)
    ids = ids_of(prompt + 9, batch=1 if in_bytes else 2)
    with torch.no_grad():
        for part in (*ids[:, :prompt].split(chunk, dim=1), *ids[:, prompt:].split(1, dim=1)):
            model(part, past_key_values=cache, logits_to_keep=1)
            check(cache)
    assert_spread(cache)
    for layer in paged_layers(cache):
        assert sum(part.scheduler.tokens_evicted for part in layer.parts) > 0


@pytest.mark.parametrize("budget", [104, "250KB"])
def test_a_budget_holds_with_beams_crops_and_forks(budget: Any) -> None:
    model = shared_model()
    cache = spread(model, 2, budget=104 if budget == 104 else "500KB")
    out = model.generate(ids_of(150), past_key_values=cache, num_beams=3, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 170)
    cache = spread(model, 2, budget=budget)
    read(model, cache, ids_of(400))
    check(cache)
    for length in (395, 350, 340):
        cache.crop(length)
        check(cache)
        next_logits(model, cache, length, steps=20)
        check(cache)
    fork = cache.fork()
    next_logits(model, fork, 360, steps=9)
    if budget == 104:
        # In bytes they hold the pages of both, and have budgets of both.
        check(cache)
        check(fork)


@pytest.mark.parametrize("budget", [8192, "100MB"])
def test_a_budget_that_is_not_reached_changes_nothing(budget: Any) -> None:
    model = shared_model()
    expected = reference(model, prompts(), max_new_tokens=16)
    assert_same(generate(model, prompts(), spread(model, 3, budget=budget), max_new_tokens=16), expected)


def test_a_budget_that_is_too_small_for_its_devices() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="leaves 60 tokens, but at least 72 are needed"):
        spread(model, 3, budget=60)
    cache = spread(model, 3, budget="60KB")
    with pytest.raises(BudgetError, match=r"budget='60KB' is too small for 1 sequence"):
        read(model, cache, ids_of(100))


# Tiers


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_tiers_of_every_device(codec: str, tmp_path: Any) -> None:
    """Fast memory for a third of the pages; the rest is on disk, and comes back when it is read."""
    model = shared_model()
    ids = ids_of(300)
    options = {"key_codec": codec, "value_codec": codec, "placement": "hash"}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs, spread(model, 1, **options), max_new_tokens=24)
    page = spread(model, 1, **options, tiers={"cpu": None, "disk": None})
    read(model, page, ids)
    whole = page.tiers.bytes_used()["cpu"]
    fast = max(whole // 3, 4 * 4096)
    cache = spread(model, 2, **options, tiers={"cpu": fast, "disk": None}, tier_directory=str(tmp_path))
    ours = generate(model, inputs, cache, max_new_tokens=24)
    assert_same(ours, expected)
    used = cache.tiers.bytes_used()
    assert 0 < used["cpu"] <= fast
    assert used["disk"] > 0
    assert cache.tiers.counters.misses > 0


# Failure


@pytest.mark.parametrize(("codec", "part"), [("none", 0), ("none", 2), ("int8", 1)])
def test_a_device_without_memory_changes_nothing(part: int, codec: str) -> None:
    """A prompt, a chunk, decoded tokens and a crop: all parts are as they were, and go on when there is memory."""
    model, ids = shared_model(), ids_of(260)
    cache, plain = (spread(model, 3, key_codec=codec, value_codec=codec, placement="hash") for _ in range(2))
    with torch.no_grad():
        for each in (cache, plain):
            model(ids[:, :100], past_key_values=each)
        layer, failed = cache.layers[0], 0
        for begin, end in [(100, 170), *((n, n + 1) for n in range(170, 180))]:
            before = [layer.stored_mask(), *layer.dense()]
            cache.memory_report()
            with no_memory_for(layer, part) as tried:
                try:
                    ours = model(ids[:, begin:end], past_key_values=cache).logits
                except MemoryError:
                    failed += 1
                    cache.crop(begin)
                    assert all(
                        torch.equal(a, b) for a, b in zip(before, [layer.stored_mask(), *layer.dense()], strict=True)
                    )
                    assert cache.get_seq_length() == begin
                    ours = None
            if ours is None:
                assert tried
                ours = model(ids[:, begin:end], past_key_values=cache).logits
            theirs = model(ids[:, begin:end], past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert failed >= 1
    fork = cache.fork()
    before = [layer.stored_mask(), *layer.dense()]
    with no_memory_for(layer, part) as tried:
        try:
            layer.truncate(101)
        except MemoryError:
            assert layer.seen == 180
            assert all(torch.equal(a, b) for a, b in zip(before, [layer.stored_mask(), *layer.dense()], strict=True))
            layer = None
    if layer is not None:
        assert layer.seen == 101
    assert fork.get_seq_length() == 180
