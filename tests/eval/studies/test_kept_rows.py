"""Rows are there as soon as they are kept, whatever happens to the one that came last."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from pikv_hf.eval.studies.kept_rows import keep, kept

ROWS = [{"id": "a", "text": 'says "no"\nand\r\n\u2028goes', "score": 0.1}, {"id": "b", "score": None}, {"id": "c"}]


@pytest.fixture(params=["rows.jsonl", "rows.jsonl.gz"])
def file(request, tmp_path):
    return tmp_path / "new" / request.param


def test_rows_are_read_as_they_were_kept(file) -> None:
    assert kept(file) == []
    keep(file, ROWS[:2])
    keep(file, [])
    keep(file, ROWS[2:])
    assert kept(file) == ROWS


def test_the_same_rows_are_the_same_bytes(file) -> None:
    keep(file, ROWS)
    once = file.read_bytes()
    file.unlink()
    keep(file, ROWS)
    assert file.read_bytes() == once


def test_what_was_cut_off_anywhere_is_left_out_and_replaced(file) -> None:
    keep(file, ROWS[:1])
    first = file.stat().st_size
    keep(file, ROWS[1:2])
    whole = file.read_bytes()
    for end in range(first, len(whole)):
        file.write_bytes(whole[:end])
        assert kept(file) == ROWS[:1]
        keep(file, ROWS[2:])
        assert kept(file) == [ROWS[0], ROWS[2]]


def test_what_is_whole_is_not_written_again(file) -> None:
    keep(file, ROWS[:2])
    before = file.read_bytes()
    file.write_bytes(before + before[:5])
    keep(file, ROWS[2:])
    assert file.read_bytes().startswith(before)
    assert kept(file) == ROWS


def test_damage_in_the_middle_is_an_error_and_nothing_is_lost(tmp_path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    for row in ROWS:
        keep(file, [row])
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged after \d+ of \d+ bytes"):
        kept(file)
    with pytest.raises(ValueError, match="damaged"):
        keep(file, ROWS)
    assert file.read_bytes() == damaged


def test_many_may_add_at_once(file) -> None:
    keep(file, ROWS[:1])
    file.write_bytes(file.read_bytes() + b"\x1f")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keep(file, [{"id": number}]), range(40)))
    found = kept(file)
    assert found[0] == ROWS[0]
    assert sorted(row["id"] for row in found[1:]) == list(range(40))
