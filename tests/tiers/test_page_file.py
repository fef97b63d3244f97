"""Pages on disk: what was written comes back, or an error says what is wrong."""

import errno
import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiered_runs import opened

from pikv_hf.tiers import page_file
from pikv_hf.tiers.file_records import HEADER_BYTES, RECORD_HEADER_BYTES, PageFileError
from pikv_hf.tiers.page_file import PageFile

PAGE_BYTES, LAYOUT = 200, 0x1234_5678_9ABC_DEF0
RECORD = PAGE_BYTES + RECORD_HEADER_BYTES


def contents(pages: list[int], page_bytes: int = PAGE_BYTES) -> np.ndarray:
    """Return bytes that are different for each page."""
    rows = [np.random.default_rng(page).integers(0, 256, page_bytes, dtype=np.uint8) for page in pages]
    return np.stack(rows) if rows else np.zeros((0, page_bytes), dtype=np.uint8)


def filled(path: Path, pages: list[int]) -> PageFile:
    file = PageFile(path, PAGE_BYTES, LAYOUT)
    file.append(pages, contents(pages))
    return file


def test_pages_come_back_in_any_order(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", [7, 3, 900])
    file.append([5, 1], contents([5, 1]))
    file.append([], contents([]))
    for order in ([7, 3, 900, 5, 1], [1, 900, 7], [3], []):
        assert np.array_equal(file.read(order), contents(order))
    assert file.nbytes == os.path.getsize(opened(file)) == HEADER_BYTES + 5 * RECORD
    assert 900 in file
    assert 4 not in file
    assert sorted(file.pages) == [1, 3, 5, 7, 900]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    file = filled(tmp_path / "b", [4])
    data = opened(file).read_bytes()
    assert data.startswith(b"PiKVpage")
    assert LAYOUT.to_bytes(8, "little") in data[:HEADER_BYTES]
    assert data[HEADER_BYTES + RECORD_HEADER_BYTES :] == contents([4]).tobytes()
    assert len(file) == 1


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_byte_or_a_missing_end_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a"
    pages = [2, 9, 4, 11]
    file = filled(path, pages)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, file.nbytes - 1))
        with open(opened(file), "r+b") as raw:
            raw.seek(place)
            old = raw.read(1)[0]
            raw.seek(place)
            raw.write(bytes([old ^ data.draw(st.integers(1, 255))]))
        hurt = [(place - HEADER_BYTES) // RECORD] if place >= HEADER_BYTES else list(range(4))
    else:
        length = data.draw(st.integers(0, file.nbytes - 1))
        os.truncate(opened(file), length)
        hurt = [i for i in range(4) if length < HEADER_BYTES + (i + 1) * RECORD]
    for index, page in enumerate(pages):
        if index in hurt:
            with pytest.raises(PageFileError, match=r"expected .*, found ") as caught:
                file.read([page])
            assert caught.value.page in (page, None)
            assert caught.value.path == path
        else:
            assert np.array_equal(file.read([page]), contents([page]))
    with pytest.raises(PageFileError):
        file.read(pages)


def test_a_record_of_another_page_is_found(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", [1, 2])
    raw = bytearray(opened(file).read_bytes())
    first, second = slice(HEADER_BYTES, HEADER_BYTES + RECORD), slice(HEADER_BYTES + RECORD, None)
    raw[first], raw[second] = raw[second], raw[first]
    opened(file).write_bytes(raw)
    with pytest.raises(PageFileError, match=r"page 1: expected record 0, page 1, .* found record 1, page 2"):
        file.read([1])


def test_a_file_of_another_layout_is_found(tmp_path: Path) -> None:
    file, other = filled(tmp_path / "a", [1]), PageFile(tmp_path / "b", PAGE_BYTES, LAYOUT + 1)
    other.append([1], contents([1]))
    opened(file).write_bytes(opened(other).read_bytes())
    with pytest.raises(PageFileError, match="header"):
        file.read([1])


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    file = filled(tmp_path / "a", [1, 2])
    before = opened(file).read_bytes()
    write, left = os.pwrite, [300]

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(error, os.strerror(error))
        done = write(descriptor, data[: left[0]], offset)
        left[0] -= done
        return done

    with monkeypatch.context() as patched:
        patched.setattr(page_file.os, "pwrite", failing)
        with pytest.raises(PageFileError, match=os.strerror(error)):
            file.append([3, 4], contents([3, 4]))
    assert opened(file).read_bytes() == before
    assert 3 not in file
    file.append([3, 4], contents([3, 4]))
    assert np.array_equal(file.read([4, 2, 3]), contents([4, 2, 3]))


def test_a_full_disk(tiny_disk: Path) -> None:
    (tiny_disk / "other").write_bytes(b"0" * 300_000)
    file, size = PageFile(tiny_disk / "a", 100_000, LAYOUT), 100_000
    file.append(range(5), contents([0, 1, 2, 3, 4], size))
    with pytest.raises(PageFileError, match="No space left"):
        file.append([5, 6, 7, 8], contents([5, 6, 7, 8], size))
    assert os.path.getsize(opened(file)) == file.nbytes == HEADER_BYTES + 5 * file.record_bytes
    file.append([5], contents([5], size))
    # Without room for a byte more there is no new file, nor one that a rewrite would make.
    (tiny_disk / "rest").write_bytes(b"0" * shutil.disk_usage(tiny_disk).free)
    with pytest.raises(PageFileError, match=r"room for a header .*No space left"):
        PageFile(tiny_disk / "b", size, LAYOUT)
    file.discard(range(5))
    assert not file.rewrite()
    assert shutil.disk_usage(tiny_disk).free == 0
    assert np.array_equal(file.read([5]), contents([5], size))
    (tiny_disk / "other").unlink()
    assert file.rewrite()
    assert shutil.disk_usage(tiny_disk).used < file.nbytes + 8192 + os.path.getsize(tiny_disk / "rest")
    file.append([50], contents([50], size))
    assert np.array_equal(file.read([50, 5]), contents([50, 5], size))


def test_a_file_of_gone_pages_is_rewritten(tmp_path: Path) -> None:
    pages = list(range(40))
    file = PageFile(tmp_path / "a", 100_000, LAYOUT)
    file.append(pages, contents(pages, 100_000))
    located = file.locate([7, 30])
    gone = [page for page in pages if page % 5]
    file.discard(gone[:8])
    file.give_back()
    assert file.nbytes == HEADER_BYTES + 40 * (100_000 + RECORD_HEADER_BYTES), "four fifths of it are in use"
    file.discard(gone[8:])
    file.give_back()
    kept = pages[::5]
    assert file.nbytes == HEADER_BYTES + 8 * (100_000 + RECORD_HEADER_BYTES)
    assert os.path.getsize(opened(file)) == file.nbytes
    assert np.array_equal(file.read(kept), contents(kept, 100_000))
    # What another thread was told stays readable.
    out = np.empty((2, file.record_bytes), dtype=np.uint8)
    located.read(out)
    assert np.array_equal(out[:, RECORD_HEADER_BYTES:], contents([7, 30], 100_000))
    file.append([7], contents([7], 100_000))
    assert np.array_equal(file.read([7, 35]), contents([7, 35], 100_000))


def test_pages_with_other_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", [1, 5, 6, 9])
    file.discard([5])
    file.renumber({6: 2, 9: 3})
    assert np.array_equal(file.read([3, 1, 2]), contents([9, 1, 6]))
    file.renumber({3: 0})
    assert sorted(file.pages) == [0, 1, 2]
    assert np.array_equal(file.read([0]), contents([9]))
    file.append([9], contents([7]))
    assert file.rewrite()
    assert np.array_equal(file.read([9, 0, 2]), contents([7, 9, 6]))


def test_small_files_are_not_rewritten(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", list(range(100)))
    file.discard(range(99))
    file.give_back()
    assert os.path.getsize(opened(file)) == file.nbytes
    assert file.dead_bytes == 99 * RECORD


def test_a_damaged_record_is_not_rewritten(tmp_path: Path) -> None:
    file = filled(tmp_path / "a", [1, 2, 3])
    file.discard([1])
    with open(opened(file), "r+b") as raw:
        raw.seek(HEADER_BYTES + RECORD + 50)
        raw.write(b"\x00\x01\x02\x03\x04")
    assert not file.rewrite()
    assert np.array_equal(file.read([3]), contents([3]))
    with pytest.raises(PageFileError, match="page 2: expected checksum"):
        file.read([2])


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = filled(folder / "a", [1])
    shutil.rmtree(folder)
    file.append([2], contents([2]))
    assert np.array_equal(file.read([2, 1]), contents([2, 1]))
    assert not file.rewrite()
    assert np.array_equal(file.read([2, 1]), contents([2, 1]))
    with pytest.raises(PageFileError, match=r"expected a new file, found .*No such file"):
        PageFile(folder / "b", PAGE_BYTES, LAYOUT)


def test_a_file_has_no_name_and_is_closed_with_the_last_reader(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    file, other = filled(tmp_path / "a", [1]), filled(tmp_path / "a", [2])
    assert not list(tmp_path.iterdir())
    assert np.array_equal(file.read([1]), contents([1]))
    assert np.array_equal(other.read([2]), contents([2]))
    located = file.locate([1])
    del file, other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1, "someone may still read from it"
    out = np.empty((1, RECORD), dtype=np.uint8)
    located.read(out)
    assert np.array_equal(out[:, RECORD_HEADER_BYTES:], contents([1]))
    del located
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
