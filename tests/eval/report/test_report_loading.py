"""Reports: what is read from folders of results."""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_folders import edit, question_rows, window_rows, write_run, write_suite

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import load_runs, markdown_table, write_report
from pikv_hf.eval.report.runs import find_folders
from pikv_hf.eval.runner.archive import archive


class TestLoading:
    def test_finds_runs_below_a_parent_once(self, tmp_path: Path) -> None:
        write_suite(tmp_path / "all")
        runs = load_runs([tmp_path / "all", tmp_path / "all" / "b", tmp_path])
        assert [run.folder.name for run in runs] == list("abcdef")

    def test_unfinished_folder_is_named_and_not_read(self, tmp_path: Path) -> None:
        write_run(tmp_path / "done", "DynamicCache")
        (tmp_path / "stopped").mkdir()
        (tmp_path / "stopped" / "partial-0.jsonl").write_text("{")
        (tmp_path / "unrelated").mkdir()
        with pytest.warns(UserWarning, match="stopped: no summary.json, the run did not finish") as caught:
            runs = load_runs([tmp_path])
        assert [run.folder.name for run in runs] == ["done"]
        assert len(caught) == 1

    def test_complete_folders_do_not_warn(self, tmp_path: Path) -> None:
        write_run(tmp_path / "done", "DynamicCache")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(load_runs([tmp_path])) == 1
        assert find_folders([tmp_path]).unfinished == ()

    def test_answers_are_text_exactly_as_written(self, tmp_path: Path) -> None:
        answers = ["NA", "null", "", "1e5", ' "quoted", with\nlines ', "答え"]
        rows = [{**row, "predicted_answer": said} for row, said in zip(question_rows(["vt"], 6), answers, strict=True)]
        [run] = load_runs([write_run(tmp_path / "run", "x", rows)])
        assert list(run.rows["predicted_answer"]) == answers
        assert run.rows["score"].tolist() == [row["score"] for row in rows]

    def test_perplexity_rows_need_no_answers(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        [run] = load_runs([write_run(tmp_path / "run", "x", window_rows(), measure=measure)])
        assert set(run.rows["predicted_answer"]) == {""}

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            load_runs([tmp_path / "nowhere"])

    def test_folder_without_runs(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no finished run in .*: expected summary.json"):
            load_runs([tmp_path])

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("score.mean", ..., "field score.mean is missing"),
            ("score.low", "high", "field score.low is 'high', expected a finite number"),
            ("cost.kv_share_prefill", float("nan"), "field cost.kv_share_prefill is nan, expected a finite number"),
            ("samples", True, "field samples is True, expected a count"),
            ("label", 3, "field label is 3, expected a string"),
            ("query_aware", "no", "field query_aware is 'no', expected true or false"),
            ("tasks.vt.metric", ..., "field tasks.vt.metric is missing"),
            ("provenance", [], r"field provenance is \[\], expected an object"),
            ("samples", 21, "20 rows, but summary.json counts 21 samples"),
            ("tasks.vt", ..., "task 'vt' is only in one of predictions.csv and summary.json"),
        ],
    )
    def test_broken_summary_names_file_and_field(self, tmp_path: Path, field: str, value: Any, message: str) -> None:
        folder = write_run(tmp_path / "run", "DynamicCache")
        edit(folder / "summary.json", field, value)
        with pytest.raises(InputError, match=message) as error:
            load_runs([folder])
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)

    def test_broken_json_names_the_line(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", "DynamicCache")
        (folder / "summary.json").write_text('{\n"dataset": \n}')
        with pytest.raises(InputError, match=r"summary.json, line 3: not JSON"):
            load_runs([folder])

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("predicted_answer", "said", "column predicted_answer is missing, found id, task"),
            ("vt-0003", "vt-0004", "id 'vt-0004' appears more than once"),
            (",1.0\r\n", ",one\r\n", r"row 1 \(id niah_single_1-0000\): score is 'one', expected a finite number"),
            (",1.0\r\n", ",inf\r\n", r"row 1 \(id niah_single_1-0000\): score is 'inf', expected a finite number"),
        ],
    )
    def test_broken_rows_name_file_and_row(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = write_run(tmp_path / "run", "DynamicCache") / "predictions.csv"
        text = path.read_bytes().decode()
        assert old in text
        path.write_bytes(text.replace(old, new, 1).encode())
        with pytest.raises(InputError, match=message) as error:
            load_runs([path.parent])
        assert str(path) in str(error.value)

    def test_missing_predictions(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "run", "DynamicCache") / "predictions.csv"
        path.unlink()
        [run] = load_runs([path.parent])
        assert "80.0 (77.0–82.0)" in markdown_table([run]), "a table needs the summary alone"
        with pytest.raises(InputError, match=r"predictions\.csv is missing"):
            _ = run.rows
        page = write_report([run], tmp_path / "out").read_text()
        assert "The samples of 1 of 1 runs were not kept" in page
        assert "Answers below full score" not in page

    def test_archived_predictions_read_like_plain_ones(self, tmp_path: Path) -> None:
        rows = [{**row, "predicted_answer": 'NA, "ü"\n', "decode_seconds": 0.5} for row in question_rows()]
        [plain] = load_runs([write_run(tmp_path / "run", "x", rows)])
        assert archive(tmp_path) == 1
        assert archive(tmp_path) == 0
        [archived] = load_runs([tmp_path])
        assert [file.name for file in sorted((tmp_path / "run").iterdir())] == ["predictions.csv.gz", "summary.json"]
        pd.testing.assert_frame_equal(archived.rows, plain.rows.drop(columns="decode_seconds"))
        file = tmp_path / "run" / "predictions.csv.gz"
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"predictions\.csv\.gz: not a CSV file"):
            load_runs([tmp_path])
