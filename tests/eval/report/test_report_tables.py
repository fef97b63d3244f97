"""Reports: how runs are grouped, ordered and shown in tables, and the examples beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from report_folders import edit, press, question_rows, window_rows, write_run, write_suite

from pikv_hf.eval.report import load_runs, markdown_table, ratio_table
from pikv_hf.eval.report.examples import EXAMPLES, LIMIT, shorten, wrong_answers
from pikv_hf.eval.report.groups import group_runs, model_name
from pikv_hf.eval.report.pareto import pareto_front
from pikv_hf.eval.report.table import escape


def table_cells(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]


class TestGroups:
    def test_baseline_first_then_press_and_ratio(self, tmp_path: Path) -> None:
        [group] = group_runs(load_runs([write_suite(tmp_path / "all")]))
        assert [entry.label for entry in group.entries] == [
            *("DynamicCache", "PiKVCache", "AdaKV(SnapKV) 50%", "Knorm 50%", "SnapKV 50%", "SnapKV 75%")
        ]
        assert [entry.method for entry in group.entries] == [
            *("DynamicCache", "PiKVCache", "AdaKV(SnapKV)", "Knorm", "SnapKV", "SnapKV")
        ]

    def test_lengths_models_and_measures_stay_apart_and_sort_by_value(self, tmp_path: Path) -> None:
        for name, changes in {
            "a": {"data_dir": "16384"},
            "b": {"data_dir": "4096"},
            "c": {"data_dir": "4096", "model": "org/other"},
            "d": {"dataset": "longbench", "data_dir": ""},
        }.items():
            write_run(tmp_path / name, "DynamicCache", **changes)
        groups = group_runs(load_runs([tmp_path]))
        titles = ["longbench, reference", "ruler 4096, org/other", "ruler 4096, reference", "ruler 16384, reference"]
        assert [group.title for group in groups] == titles
        assert [group.slug for group in groups] == ["longbench", "ruler-4096", "ruler-4096-2", "ruler-16384"]

    def test_equal_labels_get_their_folders(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            write_run(tmp_path / name, "SnapKV 50%", **press("SnapKVPress", 0.5))
        [group] = group_runs(load_runs([tmp_path]))
        assert [entry.label for entry in group.entries] == ["SnapKV 50% (one)", "SnapKV 50% (two)"]

    @pytest.mark.parametrize(
        ("label", "ratio", "method"),
        [
            ("SnapKV 12%", 0.125, "SnapKV"),
            ("SnapKV 50% on QuantizedCache quanto 4 bit", 0.5, "SnapKV on QuantizedCache quanto 4 bit"),
            ("Top 10% press 50%", 0.5, "Top 10% press"),
            ("SnapKV 50%", 0.3, "SnapKV 50%"),
            ("50%", 0.5, "50%"),
        ],
    )
    def test_method_is_the_label_without_its_own_ratio(
        self, tmp_path: Path, label: str, ratio: float, method: str
    ) -> None:
        [group] = group_runs(load_runs([write_run(tmp_path / "run", label, **press("P", ratio))]))
        assert group.entries[0].method == method

    @pytest.mark.parametrize(
        "changes", [{"machine": {"gpu": "H200"}}, {"batch_size": 4}, {"dtype": "float16"}, {"processes": 2}]
    )
    def test_speeds_of_other_conditions_are_not_compared(self, tmp_path: Path, changes: Mapping[str, Any]) -> None:
        write_run(tmp_path / "base", "DynamicCache")
        write_run(tmp_path / "same", "PiKVCache", cache="pikv", speed=3.0)
        write_run(tmp_path / "other", "PiKVCache other", cache="pikv", speed=3.0, **changes)
        cells = table_cells(markdown_table(load_runs([tmp_path])))
        assert [row[-1] for row in cells[2:]] == ["1.00x", "3.00x", "–"]

    def test_query_aware_runs_are_compared_with_their_own_baseline(self, tmp_path: Path) -> None:
        write_run(tmp_path / "base", "DynamicCache")
        write_run(tmp_path / "aware", "DynamicCache (query-aware)", query_aware=True, speed=2.0)
        write_run(
            tmp_path / "press", "SnapKV 50% (query-aware)", query_aware=True, **press("SnapKVPress", 0.5, speed=3.0)
        )
        cells = table_cells(markdown_table(load_runs([tmp_path])))
        assert [row[-1] for row in cells[2:]] == ["1.00x", "1.00x", "1.50x"]

    @pytest.mark.parametrize(
        ("model", "name"), [("org/model", "org/model"), ("/data/models/mine/", "mine"), ("./mine", "mine"), ("m", "m")]
    )
    def test_folders_of_models_are_not_shown(self, model: str, name: str) -> None:
        assert model_name(model) == name

    def test_pareto_front_is_what_no_run_dominates(self, tmp_path: Path) -> None:
        [group] = group_runs(load_runs([write_suite(tmp_path / "all")]))
        places = {e.label: (e.summary.cost.kv_share_prefill or 0, -e.summary.score.mean) for e in group.entries}
        expected = {
            label
            for label, (x, y) in places.items()
            if not any((x2, y2) != (x, y) and x2 <= x and y2 <= y for x2, y2 in places.values())
        }
        assert (
            {entry.label for entry in pareto_front(group)} == expected == {"DynamicCache", "SnapKV 50%", "SnapKV 75%"}
        )

    def test_pareto_front_of_perplexities_is_low(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        for name, value, share in (("good", 2.0, 0.5), ("bad", 3.0, 0.5), ("full", 1.5, 1.0)):
            score = {"mean": value, "low": value, "high": value}
            write_run(tmp_path / name, name, window_rows(), measure=measure, score=score, share=share)
        [group] = group_runs(load_runs([tmp_path]))
        assert [entry.label for entry in pareto_front(group)] == ["good", "full"]


class TestTable:
    def test_rows_and_numbers(self, tmp_path: Path) -> None:
        assert markdown_table(load_runs([write_suite(tmp_path / "all")])).splitlines() == [
            "| run               | score (%), 95% interval | KV after prefill | KV at end | decode speed |",
            "|-------------------|------------------------:|-----------------:|----------:|-------------:|",
            "| DynamicCache      |        80.0 (77.0–82.0) |           100.0% |    101.0% |        1.00x |",
            "| PiKVCache         |        80.0 (77.0–82.0) |           101.0% |    102.0% |        2.00x |",
            "| AdaKV(SnapKV) 50% |        70.0 (67.0–72.0) |           100.0% |    101.0% |        1.00x |",
            "| Knorm 50%         |        30.0 (27.0–32.0) |            50.0% |     51.0% |        1.00x |",
            "| SnapKV 50%        |        60.0 (57.0–62.0) |            50.0% |     51.0% |        1.20x |",
            "| SnapKV 75%        |        40.0 (37.0–42.0) |            25.0% |     26.0% |        1.50x |",
        ]

    def test_short_table_has_a_row_per_method_and_a_column_per_ratio(self, tmp_path: Path) -> None:
        write_suite(tmp_path / "all")
        write_run(tmp_path / "all" / "g", "Odd", cache="x", share=None)
        header, _, *rows = table_cells(ratio_table(load_runs([tmp_path])))
        assert header == ["score (%) at KV bytes", "0% removed", "50% removed", "75% removed"]
        assert rows == [
            ["DynamicCache", "80.0 at 100%", "–", "–"],
            ["PiKVCache", "80.0 at 101%", "–", "–"],
            ["Odd", "80.0", "–", "–"],
            ["AdaKV(SnapKV)", "–", "70.0 at 100%", "–"],
            ["Knorm", "–", "30.0 at 50%", "–"],
            ["SnapKV", "–", "60.0 at 50%", "40.0 at 25%"],
        ]

    def test_several_groups_get_titles(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "DynamicCache")
        write_run(tmp_path / "b", "DynamicCache", data_dir="4096")
        lines = markdown_table(load_runs([tmp_path])).splitlines()
        assert [line for line in lines if line.startswith("**")] == [
            "**ruler 1024, reference**",
            "**ruler 4096, reference**",
        ]

    def test_perplexity_says_which_way_is_good(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        score = {"mean": 3.14159, "low": 3.0, "high": 12.25}
        runs = load_runs([write_run(tmp_path / "run", "x", window_rows(), measure=measure, score=score)])
        header, _, row = table_cells(markdown_table(runs))
        assert header[1] == "perplexity (lower is better), 95% interval"
        assert row[1] == "3.142 (3.000–12.250)"

    def test_unmeasured_cells_are_dashes(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", "PiKVCache", cache="pikv")
        edit(folder / "summary.json", "cost.kv_share_prefill", None)
        assert table_cells(markdown_table(load_runs([folder])))[2][2:] == ["–", "101.0%", "–"]

    def test_labels_cannot_break_the_table(self, tmp_path: Path) -> None:
        label = "a | b\n| c <script> `x` \\ [l](u)"
        row = markdown_table(load_runs([write_run(tmp_path / "run", label)])).splitlines()[2]
        assert row.startswith("| a \\| b \\| c &lt;script&gt; \\`x\\` \\\\ \\[l\\](u) |")
        assert escape("plain_name 50%") == "plain_name 50%"


class TestExamples:
    def test_worst_of_each_task_in_order(self, tmp_path: Path) -> None:
        rows = question_rows(["a", "b", "c", "d", "e", "f"], samples=3, wrong=1)
        rows[0]["score"] = 0.5
        [run] = load_runs([write_run(tmp_path / "run", "x", rows)])
        found = wrong_answers(run)
        assert found is not None
        assert found.wrong == 7
        assert [example.id for example in found.shown] == ["a-0002", "b-0002", "c-0002", "d-0002"]
        assert len(found.shown) == EXAMPLES
        assert found.shown[0].question == "What is number 2? The number is"
        assert (found.shown[0].references, found.shown[0].answer) == ("1002", "no idea")

    def test_long_texts_say_what_is_missing(self) -> None:
        assert shorten("x" * LIMIT) == "x" * LIMIT
        assert shorten("x" * (LIMIT + 1234)) == "x" * LIMIT + " … (+1,234 characters)"

    def test_other_notations_of_references_are_shown_as_they_are(self, tmp_path: Path) -> None:
        rows = [{**row, "answer": "['one' 'two']"} for row in question_rows(["vt"], 2, wrong=1)]
        [run] = load_runs([write_run(tmp_path / "run", "x", rows)])
        found = wrong_answers(run)
        assert found is not None
        assert found.shown[0].references == "['one' 'two']"
