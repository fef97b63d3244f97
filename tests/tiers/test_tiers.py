"""Pages that move between fast memory, the host's memory and the disk: the same tokens, within the limits."""

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, prompts
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from pikv_hf import PiKVCache
from pikv_hf.config import CODECS
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.reports.memory_report import live_bytes
from pikv_hf.tiers import page_file, tiered_pool
from pikv_hf.tiers.page_file import HEADER_BYTES, PageFileError, Records
from pikv_hf.tiers.tier_limits import TierFull

LAYOUT = {"page_size": 8, "recent_window": 16, "num_shards": 2}
LENGTH, STEPS = 200, 24


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB - 1, (1, LENGTH), generator=torch.Generator().manual_seed(3))


def generate(model: Any, ids: Any, cache: Any, **options: Any) -> torch.Tensor:
    inputs = ids if isinstance(ids, dict) else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


@pytest.fixture(scope="module")
def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What `DynamicCache` gives for the same prompt."""
    return generate(model, ids, DynamicCache(config=model.config))


def pools_of(cache: PiKVCache) -> list[Any]:
    layers = [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]
    return [pool for layer in layers for pool in layer.table.pages.sealed.values()]


def half(model: Any, ids: Any, codec: str = "none", **options: Any) -> dict[str, Any]:
    """Return options of a cache with room for half of its pages in fast memory, the others on disk."""
    options = {**LAYOUT, "key_codec": codec, "value_codec": codec, **options}
    cache = PiKVCache.for_model(model, tiers={"cpu": None, "disk": None}, **options)
    with torch.no_grad():
        model(**(ids if isinstance(ids, dict) else {"input_ids": ids}), past_key_values=cache)
    # Lazily written: the call after the prompt would place its last tokens.
    cache.memory_report()
    return {**options, "tiers": {"cpu": sum(cache.tiers.bytes_used().values()) // 2, "disk": None}}


def fast_bytes(cache: PiKVCache) -> int:
    return live_bytes(tensor for pool in pools_of(cache) for tensor in pool.token_tensors())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Check after every update that each layer keeps to its limits; return what fast memory held."""
    update, seen = PiKVLayer.update, []

    def checked(self: PiKVLayer, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        if self.tiers is not None:
            pools = self.tiers.pools
            fast = live_bytes(tensor for pool in pools for tensor in pool.token_tensors())
            limit = self.tiers.limit(self.tiers.fast)
            assert limit is None or fast <= limit
            if "cpu" in self.tiers.names[1:]:
                lower = live_bytes(tensor for pool in pools for tensor in pool.lower.tensors())
                assert lower <= self.tiers.limit("cpu")
            seen.extend([] if limit is None else [fast])
        return result

    monkeypatch.setattr(PiKVLayer, "update", checked)
    return seen


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
            cache = PiKVCache.for_model(model, routing=routing, max_pages=3, **options)
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
    page = pools_of(plain)[0].page_bytes if codec != "none" else plain.layers[0].table.pool.page_bytes
    # A page that int4 cannot hold well takes more.
    room = 2 * max(frames * page, 2 * plain.layers[0].table.pool.page_bytes)
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
    absent = (pool.frame < 0).nonzero()[0][:4]
    copies = [part.clone() for codes in pool.codes_at(pool.index(absent)) for part in codes.tensors()]
    pool.prefetch(absent)
    assert counters.issued == 4
    assert live_bytes(pool.lower.tensors()) >= 4 * pool.page_bytes
    frames = pool.frames(pool.index(absent[:3]))
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
    assert sum(figures["pages"].values()) == sum(int((pool.refcount > 0).sum()) for pool in pools)
    assert figures["demoted"] == moved["device->cpu"] + moved.get("device->disk", 0)
    assert figures["misses"] == moved["cpu->device"] + moved["disk->device"]
    assert figures["promoted"] == 0
    assert figures["hit_rate"] == figures["hits"] / (figures["hits"] + figures["misses"])
    assert figures["bytes"]["device"] == fast_bytes(cache) <= room
    assert figures["bytes"]["cpu"] == live_bytes(t for pool in pools for t in pool.lower.tensors()) <= room
    files = list(cache.tiers.directory.iterdir())
    assert figures["bytes"]["disk"] == sum(map(os.path.getsize, files))
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
    cache = PiKVCache.for_model(model, **half(model, ids), tier_directory=str(parent))
    assert cache.tiers.directory is None
    generate(model, ids, cache)
    folder = cache.tiers.directory
    assert folder.parent == parent
    assert len(list(folder.iterdir())) == 4
    for layer in cache.layers:
        layer.keep(torch.arange(layer.seen).expand(1, 2, -1) % 2 == 0)
    gc.collect()
    assert 0 < len(list(folder.iterdir())) <= 4, "files of the pools before the eviction"
    twin = cache.fork()
    del cache, layer
    gc.collect()
    assert folder.exists()
    del twin
    gc.collect()
    assert not folder.exists()
    assert not list(parent.iterdir())


def test_rows_that_go_give_their_memory_back(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **half(model, ids))
    generate(model, ids, cache)
    cache.crop(8)
    assert sum(cache.tiers.pages().values()) == 0
    assert all(pool.free_frames == pool.frames_made for pool in pools_of(cache))
    assert not any(len(pool.lower.pages()) for pool in pools_of(cache))


# What a user can get wrong


def test_errors(model: Any, ids: torch.Tensor) -> None:
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"cpu": 3000, "disk": None})
    with pytest.raises(ValueError, match=r"'cpu' may hold 3000 bytes, 1500 in each of 2 layers, .* needs 4096"):
        generate(model, ids, cache)
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"disk": None})
    with pytest.raises(ValueError, match="attends on cpu, so tiers need a limit for 'device' or 'cpu'; got 'disk'"):
        generate(model, ids, cache)


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


# Faults


class Fault(LogitsProcessor):
    """Does something once in a running `generate`, and remembers the tokens at each step."""

    def __init__(self, cache: PiKVCache, act: Callable[[PiKVCache], None], at: int) -> None:
        self.cache, self.act, self.at, self.steps = cache, act, at, 0
        self.tokens = torch.zeros(1, 0, dtype=torch.int64)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tokens = input_ids.clone()
        if self.steps == self.at:
            self.act(self.cache)
        self.steps += 1
        return scores


def run(model: Any, ids: torch.Tensor, cache: PiKVCache, act: Callable[[PiKVCache], None], at: int = 10) -> Any:
    """Generate with a fault; return the tokens, or the error and the tokens until then."""
    fault = Fault(cache, act, at)
    try:
        return generate(model, ids, cache, logits_processor=LogitsProcessorList([fault])), None
    except (PageFileError, TierFull) as error:
        return fault.tokens, error


def go_on(model: Any, tokens: torch.Tensor, cache: PiKVCache) -> torch.Tensor:
    """Take back the call that failed, a step or the prompt, and generate the rest."""
    cache.crop(tokens.shape[1] - 1 if tokens.shape[1] > LENGTH else 0)
    left = LENGTH + STEPS - tokens.shape[1]
    return generate(model, tokens, cache, max_new_tokens=left)


def files_of(cache: PiKVCache) -> list[Path]:
    return sorted(cache.tiers.directory.iterdir())


def complete(cache: PiKVCache) -> bool:
    """Return whether files end with their last record and there are no others."""
    known = {file.path: file.nbytes for pool in pools_of(cache) for file in pool.lower._files.values()}
    return {path: os.path.getsize(path) for path in files_of(cache)} == known


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as raw:
        raw.seek(place)
        old = raw.read(1)[0]
        raw.seek(place)
        raw.write(bytes([old ^ 0x40]))


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "emptied"])
def test_a_damaged_file_is_an_error_until_it_is_whole_again(
    damage: str, model: Any, ids: torch.Tensor, expected: torch.Tensor
) -> None:
    cache = PiKVCache.for_model(model, **half(model, ids))
    whole: dict[Path, bytes] = {}

    def hurt(cache: PiKVCache) -> None:
        path = files_of(cache)[-1]
        whole[path] = path.read_bytes()
        if damage == "flipped byte":
            flip(path, HEADER_BYTES + 700)
        else:
            os.truncate(path, 0 if damage == "emptied" else len(whole[path]) - 1)

    tokens, error = run(model, ids, cache, hurt)
    assert isinstance(error, PageFileError)
    assert str(next(iter(whole))) in str(error)
    assert torch.equal(tokens, expected[:, : tokens.shape[1]])
    assert tokens.shape[1] == LENGTH + 10
    with pytest.raises(PageFileError):
        go_on(model, tokens, cache)
    for path, data in whole.items():
        path.write_bytes(data + path.read_bytes()[len(data) :])
    assert torch.equal(go_on(model, tokens, cache), expected)
    assert complete(cache)


def test_cropping_into_a_damaged_page_changes_nothing(model: Any, ids: torch.Tensor) -> None:
    """Rows that part ways in a page on disk copy it first."""
    cache, length = PiKVCache.for_model(model, **half(model, ids)), LENGTH - 100
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.memory_report()
        twin = cache.fork()
        whole = {path: path.read_bytes() for path in files_of(cache)}
        for path in whole:
            os.truncate(path, 0)
        layer = twin.layers[0]
        before = [(table.refcount.copy(), table.count.copy(), table.positions.clone()) for table in pools_of(twin)]
        with pytest.raises(PageFileError, match="found an empty file"):
            layer.crop(length)
        for pool, (refcount, count, positions) in zip(pools_of(twin), before, strict=True):
            used = refcount > 0
            assert (pool.refcount[: len(refcount)] == refcount).all()
            assert not pool.refcount[len(refcount) :].any()
            assert (pool.count[: len(count)][used] == count[used]).all()
            assert torch.equal(
                pool.positions[: len(positions)][torch.from_numpy(used)], positions[torch.from_numpy(used)]
            )
        assert layer.get_seq_length() == LENGTH
        for path, data in whole.items():
            path.write_bytes(data)
        twin.crop(length)
        other = DynamicCache(config=model.config)
        model(ids[:, :length], past_key_values=other)
        logits = [model(ids[:, length : length + 5], past_key_values=each).logits for each in (twin, other)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        assert all(layer.get_seq_length() == LENGTH for layer in cache.layers)


def test_a_directory_removed(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Open files go on working; only new ones cannot be made."""
    cache = PiKVCache.for_model(model, **half(model, ids))
    tokens, error = run(model, ids, cache, lambda cache: shutil.rmtree(cache.tiers.directory))
    assert error is None
    assert torch.equal(tokens, expected)
    # The pools of the layer after an eviction have files of their own.
    before = cache.layers[0].dense()
    with pytest.raises(PageFileError, match=r"expected a new file, found .*No such file"):
        cache.layers[0].keep(torch.ones((1, 2, cache.layers[0].seen), dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(cache.layers[0].dense(), before, strict=True))
    cache.tiers.directory.mkdir()
    cache.layers[0].keep(torch.ones((1, 2, cache.layers[0].seen), dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(cache.layers[0].dense(), before, strict=True))


def test_a_directory_removed_before_it_is_used(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    options = half(model, ids)
    cache = PiKVCache.for_model(model, **options)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
    cache.tiers.new_path("unused")
    shutil.rmtree(cache.tiers.directory)
    with pytest.raises(PageFileError, match="No such file"):
        generate(model, ids, cache)
    cache.tiers.directory.mkdir()
    cache.crop(60)
    assert torch.equal(generate(model, ids, cache), expected)
    assert complete(cache)


@pytest.mark.parametrize("call", ["pwrite", "open"])
def test_a_directory_made_read_only(
    call: str, model: Any, ids: torch.Tensor, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write where it may not, so the calls themselves fail here as they would for others."""
    cache = PiKVCache.for_model(model, **half(model, ids))

    def failing(*args: Any) -> int:
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as patched:
        if call == "open":
            patched.setattr(page_file.os, "open", failing)
            tokens, error = run(model, ids, cache, lambda cache: None)
            assert tokens.shape[1] == 0, "the prompt needs files"
            tokens = ids
        else:
            tokens, error = run(model, ids, cache, lambda cache: patched.setattr(page_file.os, "pwrite", failing))
            assert tokens.shape[1] > LENGTH
        assert isinstance(error, PageFileError)
        assert "Read-only file system" in str(error)
        assert call == "open" or complete(cache)
    assert torch.equal(go_on(model, tokens, cache), expected)
    assert complete(cache)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    gc.collect()
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up(model: Any, ids: torch.Tensor, expected: torch.Tensor, tiny_disk: Path) -> None:
    cache = PiKVCache.for_model(model, **half(model, ids), tier_directory=str(tiny_disk))

    def fill(cache: PiKVCache) -> None:
        (tiny_disk / "other").write_bytes(b"0" * shutil.disk_usage(tiny_disk).free)

    tokens, error = run(model, ids, cache, fill)
    assert isinstance(error, PageFileError)
    assert "No space left" in str(error)
    assert complete(cache)
    assert torch.equal(tokens, expected[:, : tokens.shape[1]])
    with pytest.raises(PageFileError, match="No space left"):
        go_on(model, tokens, cache)
    (tiny_disk / "other").unlink()
    assert torch.equal(go_on(model, tokens, cache), expected)
    assert complete(cache)
