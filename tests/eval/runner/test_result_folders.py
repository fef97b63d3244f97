"""Result folders: complete or resumable, whatever interrupts a run."""

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.archive import archive
from pikv_hf.eval.runner.folder import ResultFolder

CONFIG = {"model": "m", "seed": 1}


def row(index: int) -> dict:
    return {"id": f"r{index}", "task": "t", "score": index / 10, "predicted_answer": 'multi\nline, "quoted", ünïcode'}


def test_rows_survive_an_interruption_and_finish_removes_the_traces(tmp_path):
    folder = ResultFolder(tmp_path / "run", CONFIG)
    assert folder.partial_rows() == {}
    folder.append([row(0), row(1)], process=0)
    folder.append([row(2)], process=1)
    assert not folder.finished
    again = ResultFolder(tmp_path / "run", CONFIG)
    assert again.partial_rows() == {f"r{i}": row(i) for i in range(3)}
    again.finish([row(0), row(1), row(2)], {"t": {"m": 10.0}}, {"samples": 3})
    assert again.finished
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.json",
        "predictions.csv",
        "summary.json",
    ]
    rows, metrics, summary = again.read()
    assert rows["predicted_answer"].tolist() == [row(0)["predicted_answer"]] * 3
    assert (metrics, summary) == ({"t": {"m": 10.0}}, {"samples": 3})


@given(cut=st.integers(min_value=1, max_value=400), more=st.integers(min_value=0, max_value=2))
def test_a_line_cut_anywhere_is_never_taken_for_a_whole_one(tmp_path_factory, cut, more):
    folder = ResultFolder(tmp_path_factory.mktemp("runs") / "run", CONFIG)
    folder.append([row(0), row(1), row(2)])
    [file] = folder.path.glob("partial-*.jsonl")
    content = file.read_bytes()
    file.write_bytes(content[: max(0, len(content) - cut)])
    left = folder.partial_rows()
    # What is left are the first rows, each as it was written.
    assert left == {f"r{i}": row(i) for i in range(len(left))}
    assert len(left) == max(0, content[: max(0, len(content) - cut)].count(b"\n") - 1)
    folder.append([row(3 + i) for i in range(more)])
    assert folder.partial_rows() == left | {f"r{3 + i}": row(3 + i) for i in range(more)}
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_rows_of_other_options_are_not_resumed(tmp_path):
    ResultFolder(tmp_path, CONFIG).append([row(0)])
    other = ResultFolder(tmp_path, CONFIG | {"seed": 2})
    assert other.partial_rows() == {}
    other.append([row(1)])
    assert other.partial_rows() == {"r1": row(1)}


def test_a_complete_run_of_other_options_is_refused_by_name(tmp_path):
    ResultFolder(tmp_path, CONFIG).finish([row(0)], {}, {})
    with pytest.raises(InputError, match="seed 1 there, 2 here"):
        ResultFolder(tmp_path, CONFIG | {"seed": 2}).read()


def test_nothing_half_written_is_left_when_writing_fails(tmp_path, monkeypatch):
    folder = ResultFolder(tmp_path / "run", CONFIG)
    folder.append([row(0)])
    with pytest.raises(TypeError):
        folder.finish([row(0)], {"t": {1, 2}}, {})  # a set is no JSON
    assert not folder.finished
    assert folder.partial_rows() == {"r0": row(0)}


def test_a_run_is_complete_however_its_samples_are_kept(tmp_path):
    folder = ResultFolder(tmp_path / "run", CONFIG)
    folder.finish([row(0), row(1)], {"t": {"m": 5.0}}, {"samples": 2})
    plain = folder.read()
    archive(tmp_path)
    archived = folder.read()
    pd.testing.assert_frame_equal(archived[0], plain[0])
    (tmp_path / "run" / "predictions.csv.gz").unlink()
    without = folder.read()
    assert folder.finished
    assert without[0] is None
    assert plain[1:] == archived[1:] == without[1:]


def test_clear_removes_only_a_runs_own_files(tmp_path):
    folder = ResultFolder(tmp_path, CONFIG)
    folder.append([row(0)])
    folder.finish([row(0)], {}, {})
    (tmp_path / "notes.txt").write_text("mine")
    folder.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
