"""What has the name that a cache is saved under: files are replaced, links followed, and all else is left as it is."""

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from save_round_trip import assert_equal
from saved_runs import new_cache, read, shared_model

from pikv_hf import PiKVCache


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("other"))
    path.symlink_to("other")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [(fifo, "a FIFO"), (listening, "a socket"), (link_to_a_fifo, "a FIFO"), (folder, "Is a directory")],
)
def test_what_is_no_file_is_left_alone(make: Callable[[Path], None], message: str) -> None:
    model = shared_model()
    cache = read(model, new_cache(model))
    # Names of sockets are short.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "it"
        make(path)
        before = {each.name: os.lstat(each) for each in Path(scratch).iterdir()}
        with pytest.raises(OSError, match=message) as error:
            cache.save(path)
        assert error.value.filename == str(path)
        after = {each.name: os.lstat(each) for each in Path(scratch).iterdir()}
        assert {name: (each.st_ino, each.st_mode) for name, each in after.items()} == {
            name: (each.st_ino, each.st_mode) for name, each in before.items()
        }


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(there: bool, tmp_path: Path) -> None:
    """Also from one folder to another, and to a file that is not there yet."""
    model = shared_model()
    cache = read(model, new_cache(model))
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "cache"
    if there:
        target.write_bytes(b"old")
    (tmp_path / "near").symlink_to(target)
    (tmp_path / "link").symlink_to("near")
    cache.save(tmp_path / "link")
    assert all((tmp_path / name).is_symlink() for name in ("link", "near"))
    assert stat.S_ISREG(os.lstat(target).st_mode)
    assert_equal(PiKVCache.load(target, model), cache)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["cache", "far", "link", "near"]


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    model = shared_model()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        read(model, new_cache(model)).save(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_no_name() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="needs the name of a file, got ''"):
        read(model, new_cache(model)).save("")
