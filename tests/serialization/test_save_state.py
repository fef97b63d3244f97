"""What a saved cache knows beside its tokens, and what cannot be saved."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from save_round_trip import assert_equal, assert_go_on_alike, round_trip
from saved_runs import both, go_on, new_cache, read, shared_model

from pikv_hf import PiKVCache
from pikv_hf.pages.pool_id import PoolId
from pikv_hf.serialization.format import LAYER_STATE

pytestmark = pytest.mark.slow


def test_what_routing_and_scheduling_know_of_pages(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both("fp8")))
    pool = cache.layers[1].table.pools.packed[PoolId.parse("fp8")]
    ids = np.flatnonzero(pool.allocator.refcount)
    pool.key_bounds(ids[::2])
    pool.keep_usage(4)
    pool.usage.now = 5
    pool.usage.shares.uniform_()
    pool.usage.steps.random_(0, 5)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert_equal(cache, loaded)
    there = loaded.layers[1].table.pools.packed[PoolId.parse("fp8")]
    assert there.usage.now == 5
    assert sum(there.bounds.known) == len(ids[::2])
    assert float(there.usage.shares[:, : len(ids)].sum()) == pytest.approx(float(pool.usage.shares[:, ids].sum()))


@pytest.mark.parametrize(
    ("scheduler", "budget", "codec"),
    [
        ("pikv", 60, "int8"),
        ("pikv", "110KiB", "none"),
        ("h2o", 0.5, "none"),
        ("quest", 60, "int8"),
        ("ada_kv", 60, "none"),
        ("lru", 60, "auto"),
    ],
)
def test_a_budget(scheduler: str, budget: Any, codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, budget=budget, scheduler=scheduler, **both(codec)))
    for layer in cache.layers:
        layer.settle()
        assert layer.parts[0].scheduler.pages_evicted > 0
        if scheduler == "pikv":
            layer.parts[0].scheduler.policy.threshold = 0.3
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    for mine, theirs in zip(cache.layers, loaded.layers, strict=True):
        one, other = mine.parts[0].scheduler, theirs.parts[0].scheduler
        assert (one.now, one.pages_evicted, one.policy) == (other.now, other.pages_evicted, other.policy)
        assert (one.queries is None) == (other.queries is None)
        assert one.queries is None or torch.equal(one.queries, other.queries)
    assert_equal(cache, loaded)
    # Without a fork: what forks share is not evicted.
    assert_go_on_alike(model, cache, loaded)
    evicted = [[layer.parts[0].scheduler.pages_evicted for layer in each.layers] for each in (cache, loaded)]
    assert evicted[0] == evicted[1]


@pytest.mark.parametrize(
    ("tiers", "codec"),
    [
        ({"cpu": "24KiB", "disk": None}, "none"),
        ({"cpu": "24KiB", "disk": None}, "int4"),
        ({"device": "24KiB", "cpu": "8KiB", "disk": None}, "none"),
    ],
)
def test_pages_in_slow_tiers(tiers: dict[str, Any], codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, tiers=tiers, **both(codec)), tokens=200)
    pools = [pool for layer in cache.layers for pool in layer.table.pools.packed.values()]
    assert all(pool.pages_by_tier()["disk"] > 0 for pool in pools)
    path = tmp_path / "cache"
    cache.save(path)
    loaded, elsewhere = PiKVCache.load(path, model), PiKVCache.load(path, model, tiers=None)
    assert_equal(cache, loaded)
    for layer in loaded.layers:
        assert torch.equal(layer.dense()[0], elsewhere.layers[layer.layer_idx].dense()[0])
        for pool in layer.table.pools.packed.values():
            assert pool.tier_bytes(pool.tiers.fast) <= 24 * 1024
            assert pool.pages_by_tier()["disk"] > 0
    logits = [go_on(model, each) for each in (cache, loaded, elsewhere)]
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-3, rtol=1e-3)
    read(model, new_cache(model, **both(codec)), tokens=200).save(path)
    assert torch.equal(go_on(model, PiKVCache.load(path, model, tiers=tiers)).argmax(-1), logits[0].argmax(-1))


def test_tokens_that_wait_are_settled_first(tmp_path: Path) -> None:
    model = shared_model("llama")
    cache = new_cache(model)
    with torch.no_grad():
        model(torch.randint(3, 190, (2, 90)), past_key_values=cache)
    assert cache.layers[-1].pending is not None
    round_trip(model, cache, tmp_path)


def test_every_plain_attribute_of_a_layer_is_saved_or_known_to_pass(tmp_path: Path) -> None:
    model = shared_model()
    layer = read(model, new_cache(model)).layers[0]
    known = [*vars(layer).items(), *vars(layer.store).items(), *vars(layer.edits).items()]
    plain = {name for name, value in known if type(value) in (bool, int, float, str)}
    # What the model, the options or the tensors tell, and what is over with the call.
    told = {"layer_idx", "leads", "has_expert_router", "num_experts", "indexer_dim", "heads", "_may_absorb"}
    assert plain == told | {"awaits_press", "snapshot_due", "is_read"}
    fields = {field.name for field in dataclasses.fields(layer.state)}
    assert fields == set(LAYER_STATE)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = shared_model()
    caches = [read(model, new_cache(model, **both("int4"))) for _ in range(2)]
    caches[0].save(tmp_path / "cache")
    assert torch.equal(go_on(model, caches[0]), go_on(model, caches[1]))


def test_generate_goes_on(tmp_path: Path) -> None:
    model = shared_model("mixtral")
    ids = torch.randint(3, 190, (1, 60))
    whole = model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=new_cache(model))
    cache = new_cache(model)
    half = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert torch.equal(model.generate(half, max_new_tokens=20, do_sample=False, past_key_values=loaded), whole)


def test_a_model_that_accelerate_brings_to_its_device(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = FAMILIES["mixtral"].build()
    cache = read(model, new_cache(model))
    cache.save(tmp_path / "cache")
    offloaded = cpu_offload(FAMILIES["mixtral"].build(), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    loaded = PiKVCache.load(tmp_path / "cache", offloaded)
    assert loaded.layers[0].store.device == torch.device("cpu")
    assert torch.equal(go_on(model, cache, steps=3).argmax(-1), go_on(offloaded, loaded, steps=3).argmax(-1))
    other = cpu_offload(FAMILIES["mixtral"].build(seed=1), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="digest of the weights"):
        PiKVCache.load(tmp_path / "cache", other)


def test_options_that_may_change(tmp_path: Path) -> None:
    model = shared_model()
    read(model, new_cache(model)).save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model, routing="page_bound", max_pages=7)
    assert (loaded.pikv_config.routing, loaded.layers[1].config.max_pages) == ("page_bound", 7)
    loaded.save(tmp_path / "routed")
    assert PiKVCache.load(tmp_path / "routed", model, routing="all").pikv_config.max_pages == 64
    with pytest.raises(ValueError, match=r"max_pages=7 is of routing"):
        PiKVCache.load(tmp_path / "cache", model, max_pages=7)
    with pytest.raises(ValueError, match=r"page_size=16 was asked for, but the cache was saved with 8"):
        PiKVCache.load(tmp_path / "cache", model, page_size=16)
    with pytest.raises(ValueError, match="max_pages must be at least 1, got 0"):
        PiKVCache.load(tmp_path / "cache", model, max_pages=0)
    with pytest.raises(TypeError, match="did you mean 'routing'"):
        PiKVCache.load(tmp_path / "cache", model, routin="all")


def test_limits_of_no_routing_in_a_file_of_an_earlier_release(tmp_path: Path) -> None:
    model = shared_model()
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr("pikv_hf.config.OF_ROUTING", frozenset())
        read(model, new_cache(model, max_pages=16)).save(tmp_path / "cache")
    assert PiKVCache.load(tmp_path / "cache", model).pikv_config.max_pages == 64


# What cannot be saved


def test_tokens_held_by_a_press(tmp_path: Path) -> None:
    model = shared_model()
    cache = new_cache(model)
    with torch.no_grad():
        for layer in cache.layers:
            layer.edits.begin_press()
        model(torch.randint(3, 190, (1, 40)), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0: 40 of 40 tokens wait for a press"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    for layer in cache.layers:
        layer.edits.end_press()
    round_trip(model, cache, tmp_path)


def test_keys_assigned_without_values(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    cache.layers[1].keys = cache.layers[1].keys[:, :, :10]
    with pytest.raises(ValueError, match="layer 1: keys were assigned without values"):
        cache.save(tmp_path / "cache")


def test_a_cache_without_a_model(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    cache = new_cache(model)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="outlived its model"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
