"""A save replaces a file wholly or not at all, whatever becomes of the disk."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from save_round_trip import assert_equal
from saved_runs import new_cache, read, shared_model

from pikv_hf import PiKVCache
from pikv_hf.serialization import tensor_writer


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
    write, calls = tensor_writer._write, iter(range(100))

    def stop(*args: Any) -> None:
        if next(calls) >= after:
            raise error
        write(*args)

    monkeypatch.setattr(tensor_writer, "_write", stop)
    with pytest.raises(type(error)):
        cache.save(old)
    monkeypatch.undo()
    assert_equal(cache, cache.fork())


def test_a_killed_process_leaves_no_part_of_a_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    write, calls = tensor_writer._write, iter(range(100))
    reads, writes = os.pipe()

    def wait(*args: Any) -> None:
        if next(calls) == 5:
            os.write(writes, b"+")
            time.sleep(60)
        write(*args)

    monkeypatch.setattr(tensor_writer, "_write", wait)
    if not (child := os.fork()):
        signal.alarm(60)
        cache.save(old)
        os._exit(0)
    assert os.read(reads, 1) == b"+"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reads)
    os.close(writes)


@pytest.mark.parametrize("where", ["nothing", "os.replace"])
def test_where_every_file_has_a_name(where: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    monkeypatch.delattr(os, "O_TMPFILE")
    if where == "nothing":
        cache.save(old.with_name("other"))
        assert_equal(cache, PiKVCache.load(old.with_name("other"), model))
        old.with_name("other").unlink()
        return
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="could not save the cache"):
            cache.save(old)


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
