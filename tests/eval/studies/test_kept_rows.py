"""Rows are there as soon as they are kept, whatever happens to the one that came last."""

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
