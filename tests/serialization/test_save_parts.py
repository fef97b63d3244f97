"""One file has all parts of a cache on several devices, which go on where they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from divided_caches import assert_equal_layers, names, positions, round_trip, spread_over
from families import prompts
from saved_runs import both, go_on, new_cache, read, shared_model

from pikv_hf import PiKVCache

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_tokens_count")]


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, {}),
        (3, both("int4")),
        (2, {**both("lowrank"), "placement": "balanced"}),
        (2, {**both("auto"), "placement": "balanced", "hot_replicas": 2, "num_shards": 6}),
        (4, {"key_codec": "int8", "value_codec": "lowrank+int4", "rank": 4}),
        (3, {"routing": "page_bound", "max_pages": 4, **both("int8")}),
        (2, {"budget": 60, "scheduler": "quest"}),
        (2, {"budget": 0.5, "scheduler": "ada_kv", "num_shards": 4}),
        (2, {"budget": "160KiB", "scheduler": "pikv"}),
        (2, {"budget": 20, "budget_scope": "shard", "scheduler": "h2o"}),
        (2, {"tiers": {"cpu": "24KiB", "disk": None}, **both("int4")}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_several_devices(devices: int, options: dict[str, Any], tmp_path: Path) -> None:
    model = shared_model()
    cache = spread_over(model, devices, **options)
    read(model, cache, **({"tokens": 300, "batch": 1} if "160KiB" in options.values() else {"tokens": 150}))
    if "budget" in options:
        assert any(part.scheduler.pages_evicted for layer in cache.layers for part in layer.parts)
    if "tiers" in options:
        pools = [
            pool for layer in cache.layers for table in layer.store.tables() for pool in table.pools.packed.values()
        ]
        assert any(pool.pages_by_tier()["disk"] for pool in pools)
    round_trip(model, cache, tmp_path)


def test_uneven_shares(tmp_path: Path) -> None:
    """What devices may give says how later tokens are divided; those that are there stay."""
    model = shared_model()
    memory = {"cpu:0": "1GiB", "cpu:1": "3GiB"}
    options = new_cache(model).pikv_config
    cache = read(model, PiKVCache.for_model(model, options, devices=names(2), max_memory=memory))
    cache.save(tmp_path / "cache")
    loaded = [
        PiKVCache.load(tmp_path / "cache", model, devices=names(2), max_memory=each)
        for each in (memory, {"cpu:0": "3GiB", "cpu:1": "1GiB"})
    ]
    assert all(positions(each) == positions(cache) for each in loaded)
    logits = [go_on(model, each, steps=40) for each in (cache, *loaded)]
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-3, rtol=1e-3)
    assert positions(loaded[0]) == positions(cache)
    assert positions(loaded[1]) != positions(cache)


@pytest.mark.parametrize("codec", ["none", "lowrank"])
def test_a_padded_batch(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    inputs = prompts(batch=3, length=120)
    mask = inputs["attention_mask"]
    cache = spread_over(model, 2, **both(codec))
    with torch.no_grad():
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    round_trip(model, cache, tmp_path, mask)


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_beams_share_their_pages(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    cache = spread_over(model, 3, **both(codec))
    model.generate(torch.randint(3, 190, (1, 100)), num_beams=4, max_new_tokens=20, past_key_values=cache)
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.layers[0].batch == 4


def test_partly_evicted(tmp_path: Path) -> None:
    """Each head keeps tokens of its own, in widths of their own; then both go on."""
    model = shared_model()
    cache = read(model, spread_over(model, 2, **both("int4")), tokens=90)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.settle()
        shape = 2, layer.store.heads, layer.seen
        layer.keep(torch.tensor([0, 2, 4, 8, 16])[torch.randint(0, 5, shape, generator=generator)])
    assert cache.layers[0].store.lanes == 2
    round_trip(model, cache, tmp_path)


def test_sliding_layers_and_empty_caches(tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    round_trip(model, spread_over(model, 2, **both("int4")), tmp_path, steps=2)
    round_trip(model, read(model, spread_over(model, 2), tokens=60), tmp_path, steps=2)
    round_trip(model, read(model, spread_over(model, 3, sliding_layers="paged"), tokens=60), tmp_path, steps=2)


def test_pages_that_a_crop_has_cut(tmp_path: Path) -> None:
    """Pages that were moved between devices may be cut in the middle of a shard; only then are two of it not full."""
    model = shared_model()
    found = 0
    for length in (71, 101):
        cache = read(model, spread_over(model, 2, num_shards=3), tokens=150)
        with torch.no_grad():
            for step in range(30):
                model(torch.tensor([[5 + step], [6]]), past_key_values=cache)
        cache.crop(length)
        tables = [table for layer in cache.layers for table in layer.store.tables()]
        found += sum(int((table.plain.count[row.full] < 8).sum()) for table in tables for row in table.rows)
        round_trip(model, cache, tmp_path, steps=8)
    assert found


def test_balanced_placement_in_one_place(tmp_path: Path) -> None:
    """The loads by which experts were grouped, from the first prompt, are those of the loaded cache too."""
    model = shared_model()
    cache = read(model, new_cache(model, placement="balanced"))
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert_equal_layers(cache.layers[0], loaded.layers[0])
    assert torch.equal(go_on(model, cache), go_on(model, loaded))
    shards = [
        [sorted(set(t.plain.shard.tolist())) for t in layer.store.tables()] for layer in (cache.layers + loaded.layers)
    ]
    assert shards[:2] == shards[2:]
    reports = [[layer.shard_tokens for layer in each.memory_report().layers] for each in (cache, loaded)]
    assert reports[0] == reports[1]
