"""Pages that move between fast memory, the host's memory and the disk: the same tokens, within the limits."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, prompts
from tiered_runs import LAYOUT, LENGTH, fast_bytes, files_of, generate, half, opened, pools_of
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.config import CODECS
from pikv_hf.tiers import tiered_pool
from pikv_hf.tiers.file_records import PageFileError, Records
from pikv_hf.tiers.tier_limits import TierFull

pytestmark = pytest.mark.slow

# The same tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama"])
def test_half_on_disk_gives_the_tokens_of_dynamic_cache(family: str, ids: torch.Tensor, watched: list[int]) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    model = FAMILIES[family].build(num_hidden_layers=2, **layers)
    placement = {} if FAMILIES[family].routed else {"placement": "hash"}
    expected = generate(model, ids, DynamicCache(config=model.config))
    cache = PiKVCache.for_model(model, **half(model, ids, **placement))
    assert torch.equal(generate(model, ids, cache), expected)
    pages = cache.tiers.pages()
    assert pages["disk"] >= 0.49 * sum(pages.values())
    assert max(watched) > 0.8 * cache.tiers.limits["cpu"] / max(1, len(pools_of(cache)))


@pytest.mark.parametrize("levels", [("cpu", "disk"), ("device", "cpu", "disk")])
@pytest.mark.parametrize("codec", CODECS)
def test_any_codec_gives_the_same_as_without_tiers(
    codec: str, levels: tuple[str, ...], model: Any, ids: torch.Tensor, watched: list[int]
) -> None:
    options = half(model, ids, codec)
    # At least two pages of float32 in each layer; "auto" has more pools, of two pages each.
    room = max(options["tiers"]["cpu"] * (2 if codec == "auto" else 1), 8192)
    tiers = dict(
        zip(levels, (room, room // 2, None)[-len(levels) :] if len(levels) == 3 else (room, None), strict=True)
    )
    cache, plain = (PiKVCache.for_model(model, **{**options, "tiers": each}) for each in (tiers, None))
    assert torch.equal(generate(model, ids, cache), generate(model, ids, plain))
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        for one, other in zip(mine.dense(), theirs.dense(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert watched
    if codec != "auto":
        assert all(cache.tiers.pages().values())


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_padded_batches_and_beams(codec: str, model: Any) -> None:
    inputs = prompts(batch=3, length=100)
    options = half(model, inputs, codec)
    plain = {**options, "tiers": None}
    for how in ({}, {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 12}):
        cache = PiKVCache.for_model(model, **options)
        other = PiKVCache.for_model(model, **plain) if codec != "none" else DynamicCache(config=model.config)
        assert torch.equal(generate(model, inputs, cache, **how), generate(model, inputs, other, **how))
        assert cache.tiers.pages()["disk"]


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_forks_rows_lengths_and_evictions(codec: str, model: Any, ids: torch.Tensor, watched: list[int]) -> None:
    options = half(model, ids, codec)
    # At least two pages of float32 in each layer.
    room = {"cpu": max(options["tiers"]["cpu"] // 2, 12000), "disk": None}
    caches = [PiKVCache.for_model(model, **{**options, "tiers": tiers}) for tiers in (room, None)]
    more = torch.randint(2, VOCAB - 1, (4, 30))
    kept = torch.rand((2, 2, 2, LENGTH)) < 0.6
    results = []
    for cache in caches:
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits[:, -1]]
            twin = cache.fork()
            logits.append(model(more[:1], past_key_values=twin).logits)
            twin.crop(LENGTH - 45)
            cache.batch_repeat_interleave(2)
            logits.append(model(more[1:3], past_key_values=cache).logits)
            cache.crop(LENGTH)
            for layer, which in zip(cache.layers, kept, strict=True):
                layer.keep(which)
            logits.append(model(more[:2, :5], past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([1]))
            logits += [
                model(more[:1, 5 + i : 6 + i], past_key_values=each).logits for i in (0, 1) for each in (cache, twin)
            ]
        results.append((logits, [layer.dense() for each in (cache, twin) for layer in each.layers]))
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert watched
    assert caches[0].tiers.counters.demoted


def test_kernels_that_look_pages_up(model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    options = {**LAYOUT, "page_size": 16, "key_codec": "int8", "value_codec": "int8"}
    # Two pages of float32 in each layer, some more of int8.
    options["tiers"] = {"cpu": 2 * 8192, "disk": None}
    monkeypatch.setattr(tiered_pool, "STAGE_BYTES", 8000)
    logits = {}
    for backend in ("torch", "triton" if torch.cuda.is_available() else "interpret"):
        for routing in ("all", "page_bound"):
            cache = PiKVCache.for_model(
                model, routing=routing, **({} if routing == "all" else {"max_pages": 3}), **options
            )
            monkeypatch.setenv("PIKV_KERNELS", "torch")
            with torch.no_grad():
                model(ids, past_key_values=cache)
                monkeypatch.setenv("PIKV_KERNELS", backend)
                logits[backend, routing] = model(ids[:, :1], past_key_values=cache).logits
            assert cache.tiers.counters.misses
            torch.testing.assert_close(logits[backend, routing], logits["torch", routing], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("codec", ["none", "int4"])
@pytest.mark.parametrize("frames", [2, 30])
def test_routed_steps(codec: str, frames: int, model: Any, watched: list[int]) -> None:
    """Chosen pages move into fast memory, or pass through where it has no room for all of them."""
    ids = torch.randint(2, VOCAB - 1, (2, LENGTH))
    options = {**LAYOUT, "key_codec": codec, "value_codec": codec, "routing": "page_bound", "max_pages": 4}
    plain = PiKVCache.for_model(model, **options)
    tokens = generate(model, ids, plain)
    page = pools_of(plain)[0].page_bytes if codec != "none" else plain.layers[0].table.plain.page_bytes
    # A page that int4 cannot hold well takes more.
    room = 2 * max(frames * page, 2 * plain.layers[0].table.plain.page_bytes)
    cache = PiKVCache.for_model(model, **options, tiers={"cpu": room, "disk": None})
    assert torch.equal(generate(model, ids, cache), tokens)
    counters = cache.tiers.counters
    assert counters.misses
    assert counters.hits
    assert bool(counters.promoted) == (frames == 30)
    assert watched


# Ahead of need


def test_reading_ahead_changes_nothing(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = half(model, ids)
    monkeypatch.setattr(tiered_pool, "STAGE_BYTES", 9000)
    cache = PiKVCache.for_model(model, **options)
    assert torch.equal(generate(model, ids, cache), expected)
    counters = cache.tiers.counters
    assert counters.issued > 100
    assert counters.used == counters.issued
    assert counters.wasted == 0


def test_prefetched_pages_are_used_or_counted_as_wasted(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **half(model, ids))
    generate(model, ids, cache)
    pool, counters = pools_of(cache)[0], cache.tiers.counters
    absent = (pool.frames.frame_of < 0).nonzero()[0][:4]
    copies = [part.clone() for codes in pool.codes_at(pool.index(absent)) for part in codes.tensors()]
    pool.prefetch(absent)
    assert counters.issued == 4
    assert live_bytes(pool.lower.tensors()) >= 4 * pool.page_bytes
    frames = pool.fetch(pool.index(absent[:3]))
    assert (counters.used, counters.wasted) == (3, 1)
    for part, copy in zip(pool.token_tensors(), copies, strict=True):
        assert torch.equal(part[:, frames], copy[:, :3])
    assert not pool.lower.tensors()


def test_a_prefetch_that_fails_is_made_up_for(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    options = half(model, ids)
    monkeypatch.setattr(tiered_pool, "STAGE_BYTES", 9000)
    read = Records.read

    def failing(self: Records, out: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            out[:] = 7
            raise PageFileError(Path("x"), 0, "a", "b")
        read(self, out)

    monkeypatch.setattr(Records, "read", failing)
    cache = PiKVCache.for_model(model, **options)
    assert torch.equal(generate(model, ids, cache), expected)
    assert cache.tiers.counters.used == 0
    assert cache.tiers.counters.wasted == cache.tiers.counters.issued > 100


# What it says of itself


def test_counters_add_up(model: Any, ids: torch.Tensor) -> None:
    options = half(model, ids)
    room = options["tiers"]["cpu"] // 2
    cache = PiKVCache.for_model(model, **{**options, "tiers": {"device": room, "cpu": room, "disk": None}})
    generate(model, ids, cache)
    figures, pools = cache.tiers.to_dict(), pools_of(cache)
    page = pools[0].page_bytes
    moved = {way: moved // page for way, moved in figures["bytes_moved"].items()}
    assert figures["pages"] == {tier: sum(pool.pages_by_tier()[tier] for pool in pools) for tier in figures["limits"]}
    assert sum(figures["pages"].values()) == sum(int((pool.allocator.refcount > 0).sum()) for pool in pools)
    assert figures["demoted"] == moved["device->cpu"] + moved.get("device->disk", 0)
    assert figures["misses"] == moved["cpu->device"] + moved["disk->device"]
    assert figures["promoted"] == 0
    assert figures["hit_rate"] == figures["hits"] / (figures["hits"] + figures["misses"])
    assert figures["bytes"]["device"] == fast_bytes(cache) <= room
    assert figures["bytes"]["cpu"] == live_bytes(t for pool in pools for t in pool.lower.tensors()) <= room
    files = files_of(cache)
    assert figures["bytes"]["disk"] == sum(os.path.getsize(opened(file)) for file in files)
    assert len(files) == LAYOUT["num_shards"] * 2
    assert figures["stall_seconds"] > 0
    assert cache.nbytes >= figures["bytes"]["device"] + figures["bytes"]["cpu"]


def test_caches_without_tiers_have_none(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **LAYOUT)
    generate(model, ids, cache)
    assert cache.tiers is None
    assert not pools_of(cache)


def test_files_go_with_the_cache(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    parent = tmp_path / "new" / "folder"
    options = half(model, ids)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    cache = PiKVCache.for_model(model, **options, tier_directory=str(parent))
    assert cache.tiers.directory is None
    generate(model, ids, cache)
    assert cache.tiers.directory == parent
    assert len(os.listdir("/proc/self/fd")) - before == len(files_of(cache)) == 4
    for layer in cache.layers:
        layer.keep(torch.arange(layer.seen).expand(1, 2, -1) % 2 == 0)
    gc.collect()
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 4, "files of the pools before the eviction"
    assert not list(parent.iterdir())
    twin = cache.fork()
    del cache, layer
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) > before
    del twin
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_that_go_give_their_memory_back(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **half(model, ids))
    generate(model, ids, cache)
    cache.crop(8)
    assert sum(cache.tiers.pages().values()) == 0
    assert all(pool.frames.free == pool.frames_made for pool in pools_of(cache))
    assert not any(len(pool.lower.pages()) for pool in pools_of(cache))


# What a user can get wrong


def test_errors(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"cpu": 3000, "disk": None})
    with pytest.raises(ValueError, match=r"'cpu' may hold 3000 bytes, 1500 in each of 2 layers, .* needs 4096"):
        generate(model, ids, cache)
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"disk": None})
    with pytest.raises(ValueError, match="attends on cpu, so tiers need a limit for 'device' or 'cpu'; got 'disk'"):
        generate(model, ids, cache)


def test_a_first_call_that_tiers_are_too_small_for_leaves_a_cache_that_can_be_saved(tmp_path: Path) -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"cpu": 3000}, devices=["cpu:0", "cpu:1"])
    with torch.no_grad(), pytest.raises(ValueError, match="'cpu' may hold 3000 bytes"):
        model(torch.arange(2, 20)[None], past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert PiKVCache.load(tmp_path / "cache", model, devices=["cpu:0", "cpu:1"]).get_seq_length() == 0


@pytest.mark.parametrize("last", ["cpu", "disk"])
def test_a_full_last_tier(last: str, model: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    tiers = {"device": "20KB", "cpu": "20KB"} if last == "cpu" else {"cpu": "20KB", "disk": "25000B"}
    cache = PiKVCache.for_model(model, **LAYOUT, tiers=tiers)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        before = [layer.dense() for layer in cache.layers]
        number = "20000 bytes, 10000" if last == "cpu" else "25000 bytes, 12500"
        message = f"tier '{last}'.* may hold {number} in each of 2 layers; .* more are needed"
        with pytest.raises(TierFull, match=message):
            model(ids[:, 60:], past_key_values=cache)
        cache.crop(60)
        for layer, dense in zip(cache.layers, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layer.dense(), dense, strict=True))
        reached = model(ids[:, 60:75], past_key_values=cache).logits
        other = DynamicCache(config=model.config)
        torch.testing.assert_close(
            reached, model(ids[:, :75], past_key_values=other).logits[:, 60:], atol=1e-4, rtol=1e-4
        )
