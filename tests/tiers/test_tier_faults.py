"""Damaged files, directories that vanish and disks that fill up: an error, and the cache goes on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiered_runs import LENGTH, STEPS, files_of, generate, half, opened, pools_of
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from pikv_hf import PiKVCache
from pikv_hf.tiers import page_file
from pikv_hf.tiers.file_records import HEADER_BYTES, PageFileError
from pikv_hf.tiers.page_file import PageFile
from pikv_hf.tiers.tier_limits import TierFull


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


def complete(cache: PiKVCache) -> bool:
    """Return whether files end with their last record."""
    return all(os.path.getsize(opened(file)) == file.nbytes for file in files_of(cache))


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
    hurt_files: list[PageFile] = []

    def hurt(cache: PiKVCache) -> None:
        file = files_of(cache)[-1]
        path, hurt_files[:] = opened(file), [file]
        whole[path] = path.read_bytes()
        if damage == "flipped byte":
            flip(path, HEADER_BYTES + 700)
        else:
            os.truncate(path, 0 if damage == "emptied" else len(whole[path]) - 1)

    tokens, error = run(model, ids, cache, hurt)
    assert isinstance(error, PageFileError)
    assert str(hurt_files[0].path) in str(error)
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
        whole = {opened(file): opened(file).read_bytes() for file in files_of(cache)}
        for path in whole:
            os.truncate(path, 0)
        layer = twin.layers[0]
        pools = pools_of(twin)
        before = [(pool.allocator.refcount.copy(), pool.count.copy(), pool.positions.clone()) for pool in pools]
        with pytest.raises(PageFileError, match="found an empty file"):
            layer.crop(length)
        for pool, (refcount, count, positions) in zip(pools_of(twin), before, strict=True):
            used = refcount > 0
            assert (pool.allocator.refcount[: len(refcount)] == refcount).all()
            assert not pool.allocator.refcount[len(refcount) :].any()
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


def test_a_directory_removed(model: Any, ids: torch.Tensor, expected: torch.Tensor, tmp_path: Path) -> None:
    """Open files go on working; only new ones cannot be made."""
    cache = PiKVCache.for_model(model, **half(model, ids), tier_directory=str(tmp_path / "pages"))
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


def test_a_directory_removed_before_it_is_used(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    options = half(model, ids, tier_directory=str(tmp_path / "pages"))
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
