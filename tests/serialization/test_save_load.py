"""Saving and loading: what comes back is what was saved, or an error; a save replaces a file wholly or not at all."""

import errno
import functools
import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from families import FAMILIES, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.config import CODECS
from pikv_hf.eval.cli.main import app
from pikv_hf.integration.attachment import attachment_of
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.serialization import tensor_file
from pikv_hf.serialization.layer_writer import STATE
from pikv_hf.serialization.model_fingerprint import Fingerprint
from pikv_hf.serialization.pool_records import companions, most_pages, page_notes
from pikv_hf.serialization.save_load import FORMAT, LAYOUT
from pikv_hf.serialization.tensor_file import CacheFileError, Group, TensorFile, write_tensors

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 3, "rank": 4}
EXPECTED = {"format": FORMAT, "layout": LAYOUT}


@functools.cache
def shared_model(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> Any:
    options = {} if family == "gpt_oss" else {"num_hidden_layers": 2}
    return FAMILIES[family].build(**options).to(dtype)


def both(codec: str) -> dict[str, str]:
    return {"key_codec": codec, "value_codec": codec}


def new_cache(model: Any, **options: Any) -> PiKVCache:
    placement = "expert" if attachment_routers(model) else "hash"
    return PiKVCache.for_model(model, **{"placement": placement, **SMALL, **options})


def attachment_routers(model: Any) -> bool:
    return any(family.routed for family in FAMILIES.values() if family.model == type(model).__name__)


@torch.no_grad()
def read(model: Any, cache: PiKVCache, tokens: int = 120, batch: int = 2, seed: int = 1) -> PiKVCache:
    """Read random tokens; the last ones one by one."""
    ids = torch.randint(3, 190, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-3], past_key_values=cache)
    for step in range(3):
        model(ids[:, tokens - 3 + step :][:, :1], past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model: Any, cache: PiKVCache, mask: torch.Tensor | None = None, steps: int = 8) -> torch.Tensor:
    """Read a chunk of nine tokens, then go on greedily; returns the logits of every step, `(B, 1 + steps, V)`."""
    rows = cache._batch_size() or 1
    ids = torch.arange(5, 14).expand(rows, -1)
    logits = []
    for _ in range(1 + steps):
        seen = {}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            seen = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]}
        logits.append(model(ids, past_key_values=cache, **seen).logits[:, -1].float())
        ids = logits[-1].argmax(dim=-1, keepdim=True)
    return torch.stack(logits, dim=1)


def pages_by_row(layer: PiKVLayer) -> list[dict[str, Any]]:
    """Return all that is known of the pages of each row, in the order of the row's pages, without their numbers."""
    found = []
    for row in layer.table.rows:
        pages = {"window": len(row.window), "open": (row.open >= 0).tolist(), "sealed": len(row.sealed)}
        for name, pool in layer.table.pages.pools().items():
            ids = row.pages(name)
            if len(ids):
                notes = {part: note.pick(pool.index(ids)).numpy() for part, note in page_notes(pool).items()}
                pages |= {f"{name}.{part}": note.tobytes() for part, note in notes.items()}
        found.append(pages)
    return found


def assert_equal(one: PiKVCache, other: PiKVCache) -> None:
    """Compare everything that a cache consists of; numbers bit by bit."""
    assert one.pikv_config == other.pikv_config
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        if not isinstance(mine, PiKVLayer):
            assert mine.is_initialized == theirs.is_initialized
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert not mine.is_initialized or torch.equal(mine.keys, theirs.keys)
            assert not mine.is_initialized or torch.equal(mine.values, theirs.values)
            continue
        assert {name: getattr(mine, name) for name in STATE} == {name: getattr(theirs, name) for name in STATE}
        assert mine.config == theirs.config
        assert (mine.table is None) == (theirs.table is None)
        if mine.table is not None:
            assert_same_tables(mine, theirs)
    ours, theirs = one.memory_report(), other.memory_report()
    assert theirs.total <= ours.total
    for name in ("tokens_stored", "tokens_seen", "shard_tokens", "shards", "device", "kind"):
        assert [getattr(a, name) for a in ours.layers] == [getattr(b, name) for b in theirs.layers], name


def assert_same_tables(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    for name in ("heads", "dtype", "device", "lanes"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert mine.padding() == theirs.padding()
    assert torch.equal(mine.held(), theirs.held())
    for one, other in zip(mine.dense(), theirs.dense(), strict=True):
        assert torch.equal(one, other)
    tables = mine.table, theirs.table
    assert tables[0].tokens() == tables[1].tokens()
    assert pages_by_row(mine) == pages_by_row(theirs)
    shared = [[[a is b for b in table.rows] for a in table.rows] for table in tables]
    assert shared[0] == shared[1]
    writers = [(t.writer.num_shards, t.writer.recent_window, t.writer.sink_pages) for t in tables]
    assert writers[0] == writers[1]
    stores = [table.pages for table in tables]
    assert stores[0].config == stores[1].config
    for keys in (True, False):
        for one, other in zip(stores[0].bases(keys), stores[1].bases(keys), strict=True):
            assert torch.equal(one, other)
    assert (stores[0].queries is None) == (stores[1].queries is None)
    if stores[0].queries is not None:
        assert torch.equal(stores[0].queries, stores[1].queries)
        assert stores[0].query_scale == stores[1].query_scale


def assert_compact(cache: PiKVCache) -> None:
    """Check that all pages are held, and by as many sequences as their references say."""
    for layer in cache.layers:
        table = getattr(layer, "table", None)
        for name, pool in ({} if table is None else table.pages.pools()).items():
            held = np.concatenate([sequence.pages(name) for sequence in table._sequences()])
            assert (pool.refcount == np.bincount(held, minlength=pool.capacity)).all()
            assert pool.capacity <= most_pages(len(np.unique(held)))


def tokens_by_row(cache: PiKVCache) -> list[list[int]]:
    return [layer.table.tokens() for layer in cache.layers if getattr(layer, "table", None) is not None]


def capacities(cache: PiKVCache) -> list[list[int]]:
    tables = [layer.table for layer in cache.layers if getattr(layer, "table", None) is not None]
    return [[pool.capacity for pool in table.pages.pools().values()] for table in tables]


def assert_go_on_alike(
    model: Any, one: PiKVCache, other: PiKVCache, mask: torch.Tensor | None = None, shares: bool = False
) -> None:
    """Go on with both caches: the same tokens, and the very same logits where pages lie as they did."""
    as_it_lay = not shares and capacities(one) == capacities(other)
    logits = go_on(model, one, mask), go_on(model, other, mask)
    if as_it_lay:
        assert torch.equal(*logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    # Else pages lie closer together than they did, so that sums may be taken in another order.
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert tokens_by_row(one) == tokens_by_row(other)


def round_trip(
    model: Any, cache: PiKVCache, folder: Path, mask: torch.Tensor | None = None, shares: bool = False
) -> PiKVCache:
    """Save and load a cache, compare, go on with both and compare again; returns what was loaded.

    `shares` tells that other caches hold its pages, which are then copied before they are written to.
    """
    path = folder / "cache.safetensors"
    cache.save(path)
    loaded = PiKVCache.load(path, model)
    assert [file.name for file in folder.iterdir()] == [path.name]
    assert_equal(cache, loaded)
    assert_compact(loaded)
    # What was loaded has nothing to do with the file any more.
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    # Of both, so that both copy pages.
    _, fork = cache.fork(), loaded.fork()
    assert_go_on_alike(model, cache, loaded, mask, shares)
    assert_usable(model, fork, mask)
    return loaded


@torch.no_grad()
def assert_usable(model: Any, cache: PiKVCache, mask: torch.Tensor | None) -> None:
    """Select rows, crop and go on."""
    if cache._batch_size() is None:
        return
    cache.batch_select_indices(torch.tensor([0]))
    before = cache.get_seq_length()
    go_on(model, cache, None if mask is None else mask[:1], steps=2)
    if not any(layer.is_sliding for layer in cache.layers):
        cache.crop(before)
        assert cache.get_seq_length() == before
    assert all(layer.batch == 1 for layer in cache.layers if isinstance(layer, PiKVLayer))


# Round trips


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both(codec)))
    assert any(layer.table.pages.sealed for layer in cache.layers) == (codec != "none")
    loaded = round_trip(model, cache, tmp_path)
    for layer in loaded.layers:
        for sealer, keys in zip(layer.table.pages._sealers or (), (True, False), strict=False):
            pools = [pool for name, pool in layer.table.pages.sealed.items() if "lowrank" in name]
            assert all((pool.key_codec if keys else pool.value_codec) in sealer.codecs.values() for pool in pools)


@pytest.mark.parametrize("codecs", [("int4", "none"), ("auto", "lowrank")])
def test_codecs_that_differ(codecs: tuple[str, str], tmp_path: Path) -> None:
    model = shared_model()
    round_trip(model, read(model, new_cache(model, key_codec=codecs[0], value_codec=codecs[1])), tmp_path)


@pytest.mark.parametrize("sliding", ["bounded", "paged"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "jetmoe", "llama"])
def test_families(family: str, sliding: str, tmp_path: Path) -> None:
    """Sliding layers, keys and values of different width, a model whose attention loses the cache, a dense model."""
    model = shared_model(family)
    cache = read(model, new_cache(model, sliding_layers=sliding, **both("int8")))
    assert any(not isinstance(layer, PiKVLayer) for layer in cache.layers) == (
        family == "gpt_oss" and sliding == "bounded"
    )
    round_trip(model, cache, tmp_path)


def test_a_sliding_layer_before_its_window_is_full(tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    round_trip(model, read(model, new_cache(model), tokens=9), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "codec"),
    [(torch.float16, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int4"), (torch.bfloat16, "lowrank")],
)
def test_narrow_floats(dtype: torch.dtype, codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral", dtype)
    cache = read(model, new_cache(model, **both(codec)))
    path = tmp_path / "cache"
    cache.save(path)
    loaded = PiKVCache.load(path, model)
    assert_equal(cache, loaded)
    assert torch.equal(go_on(model, cache, steps=4).argmax(-1), go_on(model, loaded, steps=4).argmax(-1))


@pytest.mark.parametrize("codec", ["none", "int4", "lowrank"])
def test_a_padded_batch(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    inputs = prompts(batch=3, length=120)
    mask = inputs["attention_mask"]
    cache = new_cache(model, **both(codec))
    with torch.no_grad():
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    assert cache.layers[0].padding() != [0, 0, 0]
    round_trip(model, cache, tmp_path, mask)


@pytest.mark.parametrize("codec", ["none", "auto"])
def test_beams_share_their_pages(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    cache = new_cache(model, **both(codec))
    ids = torch.randint(3, 190, (1, 100))
    model.generate(ids, num_beams=4, max_new_tokens=20, past_key_values=cache)
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.layers[0].batch == 4


def test_shared_pages_are_written_once(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model), batch=1)
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(8)
    cache.save(tmp_path / "eight")
    one, eight = ((tmp_path / name).stat().st_size for name in ("one", "eight"))
    assert one <= eight < 1.02 * one
    rows = PiKVCache.load(tmp_path / "eight", model).layers[0].table.rows
    assert len(rows) == 8
    assert all(row is rows[0] for row in rows)


def test_forks_are_saved_apart(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both("int4")))
    forks = [cache.fork() for _ in range(2)]
    go_on(model, forks[0])
    forks[1].crop(60)
    for fork in (cache, *forks):
        round_trip(model, fork, tmp_path, shares=True)


def test_only_pages_in_use_are_written(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model), batch=4)
    cache.save(tmp_path / "all")
    cache.batch_select_indices(torch.tensor([2]))
    cache.crop(40)
    assert cache.layers[0].table.pool.free_pages > 0
    cache.save(tmp_path / "little")
    assert (tmp_path / "little").stat().st_size < 0.2 * (tmp_path / "all").stat().st_size
    (tmp_path / "all").unlink()
    (tmp_path / "little").unlink()
    loaded = round_trip(model, cache, tmp_path)
    assert cache.nbytes > 2 * loaded.nbytes


@pytest.mark.parametrize("codec", ["none", "int4", "lowrank+int4"])
@pytest.mark.parametrize("kind", ["uniform", "lanes", "widths"])
def test_partly_evicted(kind: str, codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both(codec)))
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.settle()
        shape = 2, layer.heads, layer.seen
        kept = torch.rand(shape, generator=generator) < 0.5
        if kind == "uniform":
            kept = kept[:, :1].expand(shape)
        if kind == "widths":
            kept = torch.tensor([0, 2, 4, 8, 16])[torch.randint(0, 5, shape, generator=generator)]
        layer.keep(kept)
    assert cache.layers[0].lanes == (1 if kind == "uniform" else 2)
    round_trip(model, cache, tmp_path)


@pytest.mark.parametrize("press_name", ["KnormPress", "AdaKVPress"])
def test_compressed_by_kvpress(press_name: str, tmp_path: Path) -> None:
    """Assigned keys and values, of layers that count fewer columns than the model has seen, and marked heads."""
    import kvpress

    model = FAMILIES["qwen3_moe"].build()
    press = getattr(kvpress, press_name)
    press = press(press=kvpress.KnormPress(0.5)) if press_name == "AdaKVPress" else press(0.5)
    cache = new_cache(model, **both("int4"))
    with torch.no_grad(), press(model):
        model.model(torch.randint(3, 190, (1, 150)), past_key_values=cache)
    for layer in cache.layers:
        layer.settle()
    if press_name == "AdaKVPress":
        assert cache.layers[0].evicted
    else:
        assert cache.layers[0].dropped > 0
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.get_seq_length() == 150 + 9 + 8


def test_layers_with_codecs_of_their_own(tmp_path: Path) -> None:
    model = shared_model()
    cache = new_cache(model)
    cache.layers[1].recode(key_codec="lowrank", value_codec="int2", rank=3)
    read(model, cache)
    loaded = round_trip(model, cache, tmp_path)
    codecs = [(layer.config.key_codec, layer.config.value_codec) for layer in loaded.layers]
    assert codecs == [("none", "none"), ("lowrank", "int2")]


@pytest.mark.parametrize("how", ["new", "reset", "cropped", "sliding"])
def test_an_empty_cache(how: str, tmp_path: Path) -> None:
    model = shared_model("gpt_oss" if how == "sliding" else "qwen3_moe")
    cache = new_cache(model, **both("int4"))
    if how in ("reset", "cropped"):
        read(model, cache, batch=1)
        cache.reset() if how == "reset" else cache.crop(-cache.get_seq_length())
    round_trip(model, cache, tmp_path)


def test_what_routing_and_scheduling_know_of_pages(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both("fp8")))
    pool = cache.layers[1].table.pages.sealed["fp8"]
    ids = np.flatnonzero(pool.refcount)
    pool.key_bounds(ids[::2])
    pool.watch(4)
    pool.usage.now = 5
    pool.usage.shares.uniform_()
    pool.usage.steps.random_(0, 5)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert_equal(cache, loaded)
    there = loaded.layers[1].table.pages.sealed["fp8"]
    assert there.usage.now == 5
    assert set(companions(there)) == {"bounds", "usage"}
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
        assert layer.schedule.pages_evicted > 0
        if scheduler == "pikv":
            layer.schedule.policy.threshold = 0.3
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    for mine, theirs in zip(cache.layers, loaded.layers, strict=True):
        one, other = mine.schedule, theirs.schedule
        assert (one.now, one.pages_evicted, one.policy) == (other.now, other.pages_evicted, other.policy)
        assert (one.queries is None) == (other.queries is None)
        assert one.queries is None or torch.equal(one.queries, other.queries)
    assert_equal(cache, loaded)
    # Without a fork: what forks share is not evicted.
    assert_go_on_alike(model, cache, loaded)
    evicted = [[layer.schedule.pages_evicted for layer in each.layers] for each in (cache, loaded)]
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
    pools = [pool for layer in cache.layers for pool in layer.table.pages.sealed.values()]
    assert all(pool.pages_by_tier()["disk"] > 0 for pool in pools)
    path = tmp_path / "cache"
    cache.save(path)
    loaded, elsewhere = PiKVCache.load(path, model), PiKVCache.load(path, model, tiers=None)
    assert_equal(cache, loaded)
    for layer in loaded.layers:
        assert torch.equal(layer.dense()[0], elsewhere.layers[layer.layer_idx].dense()[0])
        for pool in layer.table.pages.sealed.values():
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
    plain = {name for name, value in vars(layer).items() if type(value) in (bool, int, float, str)}
    # What the model, the options or the tensors tell, and what is over with the call.
    assert plain - set(STATE) == {"layer_idx", "routed", "heads", "holds", "_returns", "leads"}


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
    assert loaded.layers[0].device == torch.device("cpu")
    assert torch.equal(go_on(model, cache, steps=3).argmax(-1), go_on(offloaded, loaded, steps=3).argmax(-1))
    other = cpu_offload(FAMILIES["mixtral"].build(seed=1), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="digest of the weights"):
        PiKVCache.load(tmp_path / "cache", other)


def test_options_that_may_change(tmp_path: Path) -> None:
    model = shared_model()
    read(model, new_cache(model)).save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model, routing="page_bound", max_pages=7)
    assert (loaded.pikv_config.routing, loaded.layers[1].config.max_pages) == ("page_bound", 7)
    with pytest.raises(ValueError, match=r"page_size=16 was asked for, but the cache was saved with 8"):
        PiKVCache.load(tmp_path / "cache", model, page_size=16)
    with pytest.raises(ValueError, match="max_pages must be at least 1, got 0"):
        PiKVCache.load(tmp_path / "cache", model, max_pages=0)
    with pytest.raises(TypeError, match="did you mean 'routing'"):
        PiKVCache.load(tmp_path / "cache", model, routin="all")


# What cannot be saved


def test_tokens_held_by_a_press(tmp_path: Path) -> None:
    model = shared_model()
    cache = new_cache(model)
    with torch.no_grad():
        for layer in cache.layers:
            layer.hold()
        model(torch.randint(3, 190, (1, 40)), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0: 40 of 40 tokens wait for a press"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    for layer in cache.layers:
        layer.release()
    round_trip(model, cache, tmp_path)


def test_keys_assigned_without_values(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    cache.layers[1].keys = cache.layers[1].keys[:, :, :10]
    with pytest.raises(ValueError, match="layer 1: keys were assigned without values"):
        cache.save(tmp_path / "cache")


def test_a_cache_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made from a config alone"):
        PiKVCache(shared_model().config).save(tmp_path / "cache")
    model = FAMILIES["llama"].build()
    cache = new_cache(model)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="outlived its model"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


# What cannot be loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small cache that uses most of the format."""
    model = shared_model("gpt_oss")
    cache = read(model, new_cache(model, key_codec="int4", value_codec="lowrank"), tokens=70)
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path)
    return path


def test_other_models(saved: Path) -> None:
    build = FAMILIES["gpt_oss"].build
    for model, message in (
        (build(seed=1), r"the digest of the weights of \S+ is '\w{16}' there and '\w{16}' here \(6 of 6 parts"),
        (build(rms_norm_eps=1e-3), "rms_norm_eps is 1e-05 there and 0.001 here"),
        (build().to(torch.bfloat16), "dtype is 'float32' there and 'bfloat16' here"),
        (FAMILIES["mixtral"].build(), "more fields of the config"),
    ):
        with pytest.raises(CacheFileError, match=message):
            PiKVCache.load(saved, model)
        assert attachment_of(model) is None, "a model was attached although nothing was loaded"


@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj.weight", "layers.2.mlp.experts.down_proj", "norm.weight"])
def test_any_parameter_that_was_trained_on_is_noticed(name: str) -> None:
    model = FAMILIES["gpt_oss"].build()
    before = Fingerprint.of(model)
    parameter = model.model.get_parameter(name)
    parameter.data += 1e-3
    part = name.rpartition(".")[0] if name.startswith("norm") else ".".join(name.split(".")[:2])
    assert f"the weights of model.{part} is" in before.differences(Fingerprint.of(model))


def test_the_fingerprint_is_that_of_the_numbers() -> None:
    model = FAMILIES["mixtral"].build()
    before = Fingerprint.of(model)
    new_cache(model)
    model.config.use_cache = False
    for parameter in model.parameters():
        # The same numbers, in another order in memory.
        parameter.data = parameter.data.mT.contiguous().mT if parameter.ndim > 1 else parameter.data
    assert before == Fingerprint.of(model)
    assert before.differences(Fingerprint.of(model)) == ""


def test_files_that_are_no_saved_cache(saved: Path, tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="file"):
        PiKVCache.load(path, model)
    with pytest.raises(IsADirectoryError):
        PiKVCache.load(tmp_path, model)
    for content in (b"", b"abc", b"\0" * 100, b"a text of a few words, and no cache", os.urandom(4000), b"\x10" * 80):
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match="is no saved cache"):
            PiKVCache.load(path, model)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(CacheFileError, match="no saved cache: its header has no metadata"):
        PiKVCache.load(path, model)
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CacheFileError, match="its format is 'pt', this release reads 'pikv-cache'"):
        PiKVCache.load(path, model)


def test_another_layout(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pikv_hf.serialization.save_load.LAYOUT", "7")
    with pytest.raises(CacheFileError, match=f"its layout is '{LAYOUT}', this release reads '7'"):
        PiKVCache.load(saved, shared_model("gpt_oss"))


def test_a_damaged_tensor_is_named(saved: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "cache", bytearray(saved.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=r"tensor 'layers\.\d.*' is damaged: checksum \w{16}, written was \w{16}"):
        PiKVCache.load(path, shared_model("gpt_oss"))
    path.write_bytes(content[:-5])
    size = len(content)
    with pytest.raises(CacheFileError, match=f"has {size - 5} bytes where {size} were written"):
        PiKVCache.load(path, shared_model("gpt_oss"))


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_goes_unnoticed(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(content))]), label="part")
    place = data.draw(st.integers(first, last - 1), label="byte")
    if data.draw(st.booleans(), label="cut off"):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255), label="flipped bits")
    path = saved.with_name("damaged")
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        PiKVCache.load(path, shared_model("gpt_oss"))


def test_no_byte_of_a_file_of_tensors_may_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, EXPECTED, [Group.of({"a": torch.arange(3), "b": torch.ones(5, dtype=torch.bool)})])

    def verified() -> dict[str, torch.Tensor]:
        with TensorFile(path, EXPECTED) as file:
            file.verify()
            return {name: file[name].clone() for name in file.specs}

    assert verified()["a"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(CacheFileError):
            verified()
        path.write_bytes(content[:place])
        with pytest.raises(CacheFileError):
            verified()
    path.write_bytes(content + b"\0")
    with pytest.raises(CacheFileError, match="cut off or added to"):
        verified()


def rewritten(saved: Path, path: Path, change: Callable[[list[Any], dict[str, torch.Tensor]], None]) -> Path:
    """Write a file with right checksums of changed descriptions of layers and tensors."""
    with TensorFile(saved, {"format": FORMAT}) as file:
        tensors = {name: file[name].clone() for name in file.specs}
        metadata = {k: v for k, v in file.metadata.items() if k not in ("checksums", "header_checksum")}
    layers = json.loads(metadata["layers"])
    change(layers, tensors)
    groups = [Group.of({name: tensor}) for name, tensor in tensors.items()]
    write_tensors(path, {**metadata, "layers": json.dumps(layers)}, groups)
    return path


def set_tensor(name: str, place: Any, value: int) -> Callable[[list[Any], dict[str, torch.Tensor]], None]:
    def change(layers: list[Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = value

    return change


MIXED = "layers.1.pages.int4/lowrank"
INCONSISTENT: dict[str, tuple[Callable[[list[Any], dict[str, torch.Tensor]], Any], str]] = {
    "page beyond": (set_tensor("layers.1.ids", 0, 999), "layer 1: page numbers in pool"),
    "page below": (set_tensor("layers.1.ids", 0, -1), "layer 1: page numbers"),
    "page twice": (lambda layers, t: t["layers.1.ids"].copy_(t["layers.1.ids"].roll(1)), "layer 1: "),
    "lengths": (set_tensor("layers.1.lengths", (0, 0), 99), "layer 1: "),
    "row": (set_tensor("layers.1.rows", 0, 5), "layer 1: rows"),
    "count": (set_tensor("layers.1.pages.plain.count", 0, 9), "counts of pool ''"),
    "position": (set_tensor(f"{MIXED}.positions", (0, 7), 10**6), "positions in pool"),
    "two positions": (set_tensor(f"{MIXED}.positions", (0, 1), 40), "a row has a position twice"),
    "shard": (set_tensor(f"{MIXED}.shard", 0, 3), "shards in pool"),
    "dtype": (lambda layers, t: t.update({f"{MIXED}.tokens.0": t[f"{MIXED}.tokens.0"].short()}), "expected Spec"),
    "shape": (lambda layers, t: t.update({f"{MIXED}.errors": t[f"{MIXED}.errors"][:, :4]}), "expected Spec"),
    "missing": (lambda layers, t: t.pop(f"{MIXED}.tokens.1"), "is None, expected Spec"),
    "missing rows": (lambda layers, t: t.pop("layers.1.rows"), "makes no sense: KeyError"),
    "unknown": (lambda layers, t: t.update({"layers.1.more": torch.ones(1)}), "1 tensors belong to no layer"),
    "fewer layers": (lambda layers, t: [layers.pop(), t.pop("layers.2.keys"), t.pop("layers.2.values")], "2 layers"),
    "kind": (lambda layers, t: layers[0].update(kind="paged"), "makes no sense: KeyError"),
    "state": (lambda layers, t: layers[1]["state"].pop("seen"), "makes no sense: KeyError"),
    "negative": (lambda layers, t: layers[1]["state"].update(dropped=-1), "negative lengths"),
    "option": (lambda layers, t: layers[1]["config"].update(new=1), "unknown option 'new'"),
    "type": (lambda layers, t: layers[1]["table"].update(dtype="nothing"), "makes no sense: AttributeError"),
    "router": (lambda layers, t: layers[1].update(routed=False), "a router was known: False there, True here"),
    "codec": (lambda layers, t: layers[1]["table"]["pools"][1].update(name="int8"), "has the codecs of"),
    "padding": (lambda layers, t: layers[1].update(padding=[1]), r"2 rows, paddings \[1\]"),
    "lanes": (lambda layers, t: layers[1]["table"].update(page_heads=0), "makes no sense: ZeroDivisionError"),
    "dims": (lambda layers, t: layers[1]["table"].update(dims=[-1, 4]), "makes no sense: RuntimeError"),
    "window": (lambda layers, t: layers[0].update(window=9), "layer 0: "),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_bookkeeping_that_does_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = INCONSISTENT[case]
    path = rewritten(saved, tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=message) as error:
        PiKVCache.load(path, shared_model("gpt_oss"))
    assert str(error.value).startswith(str(path))


def test_rewriting_alone_harms_nothing(saved: Path, tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    path = rewritten(saved, tmp_path / "cache", lambda layers, tensors: None)
    assert_equal(PiKVCache.load(saved, model), PiKVCache.load(path, model))


def test_a_failed_load_attaches_nothing(saved: Path, tmp_path: Path) -> None:
    model = FAMILIES["gpt_oss"].build()
    change, _ = INCONSISTENT["count"]
    with pytest.raises(CacheFileError):
        PiKVCache.load(rewritten(saved, tmp_path / "cache", change), model)
    assert attachment_of(model) is None
    PiKVCache.load(saved, model)
    assert attachment_of(model).active
    detach(model)


# The file


def test_the_format_is_safetensors(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pikv-cache"
        assert PiKVConfig.from_json(metadata["config"]).key_codec == "int4"
        checksums = json.loads(metadata["checksums"])
        assert set(checksums) == set(file.keys())
        for name, checksum in checksums.items():
            assert xxhash.xxh3_64_hexdigest(file.get_tensor(name).view(-1).view(torch.uint8).numpy()) == checksum
    # The zip archive of a pickle would begin with PK, a bare one with 0x80.
    assert saved.read_bytes()[8:9] == b"{"


def test_a_page_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pikv_hf.serialization.pool_records.CHUNK_PAGES", 3)
    model = shared_model()
    round_trip(model, read(model, new_cache(model, **both("int2"))), tmp_path)


# Failing writes


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """Return a path where another cache was saved, and check after the test that it is as it was, and alone."""
    path = tmp_path / "cache"
    model = shared_model()
    read(model, new_cache(model), tokens=30, batch=1).save(path)
    content = path.read_bytes()
    yield path
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_write_that_fails(where: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match=r"could not save the cache \(Input/output error\); what was there") as error:
            cache.save(old)
    assert error.value.errno == errno.EIO
    assert error.value.filename == str(old)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("after", [0, 5])
def test_a_write_that_stops(error: BaseException, after: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    write, calls = tensor_file._write, iter(range(100))

    def stop(*args: Any) -> None:
        if next(calls) >= after:
            raise error
        write(*args)

    monkeypatch.setattr(tensor_file, "_write", stop)
    with pytest.raises(type(error)):
        cache.save(old)
    monkeypatch.undo()
    assert_equal(cache, cache.fork())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    model = shared_model()
    with pytest.raises(FileNotFoundError, match="could not save the cache"):
        read(model, new_cache(model)).save(tmp_path / "no" / "cache")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    model = shared_model()
    with pytest.raises(OSError, match="could not save the cache"):
        read(model, new_cache(model)).save(tmp_path / "cache")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    model = shared_model()
    path = small_disk / "cache"
    little = read(model, new_cache(model), tokens=40, batch=1)
    little.save(path)
    much = read(model, new_cache(model), tokens=600, batch=4)
    assert much.nbytes > 1 << 20
    with pytest.raises(OSError, match="No space left on device") as error:
        much.save(path)
    assert error.value.errno == errno.ENOSPC
    assert [file.name for file in small_disk.iterdir()] == ["cache"]
    assert_equal(little, PiKVCache.load(path, model))


def test_a_read_only_disk(small_disk: Path) -> None:
    model = shared_model()
    path = small_disk / "cache"
    little = read(model, new_cache(model), tokens=40, batch=1)
    little.save(path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        read(model, new_cache(model)).save(path)
    assert_equal(little, PiKVCache.load(path, model))


# The benchmark


def test_the_benchmark_compares_with_reading_again(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    arguments = ["bench", "load", "--tokens", "300", "--repeats", "1", "--layers", "1", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--chunk", "200", "--output", str(output)])
    assert result.exit_code == 0, result.output
    cases = json.loads(output.read_text())["results"]
    assert [case["codec"] for case in cases] == ["none", "int4"]
    for case in cases:
        assert (case["tokens"], case["chunk"], case["layers"], case["load"]["count"]) == (300, 200, 1, 1)
        assert case["same_tokens"]
        assert case["max_difference"] == 0
        assert case["ratio"] == pytest.approx(case["prefill"] / case["load"]["p50"])
        assert case["loaded_bytes"] <= case["kv_bytes"]
        # Free pages are not in the file, which has a header instead.
        assert 0.5 * case["kv_bytes"] < case["file_bytes"] < case["kv_bytes"] + 32768


def test_the_benchmark_refuses_unknown_codecs() -> None:
    result = CliRunner().invoke(app, ["bench", "load", "--codec", "int5"])
    assert result.exit_code == 2
    assert "int5" in result.output
