"""Reports: what is read from result folders, how runs are grouped, ordered and shown, and that pages repeat exactly."""

import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_folders import HOSTILE, edit, needle_rows, press, question_rows, window_rows, write_run, write_suite

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import accuracy_figure, load_runs, markdown_table, ratio_table, write_report
from pikv_hf.eval.report.examples import EXAMPLES, LIMIT, shorten, wrong_answers
from pikv_hf.eval.report.figure_accuracy import pareto_front
from pikv_hf.eval.report.figure_needle import needle_figure
from pikv_hf.eval.report.figure_tasks import tasks_figure
from pikv_hf.eval.report.groups import group_runs, model_name
from pikv_hf.eval.report.runs import find_folders
from pikv_hf.eval.report.style import method_styles, wrap
from pikv_hf.eval.report.table import escape
from pikv_hf.eval.runner.archive import archive


def table_cells(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]


def png_size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def png_chunks(path: Path) -> dict[str, bytes]:
    """The chunks of a PNG file by kind, their checksums verified."""
    data, start, chunks = path.read_bytes(), 8, {}
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        kind, body = data[start + 4 : start + 8], data[start + 8 : start + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[start + 8 + length : start + 12 + length])[0]
        chunks[kind.decode()] = body
        start += 12 + length
    return chunks


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


class TestFigures:
    def test_figures_are_readable_at_900_pixels_and_repeat_exactly(self, tmp_path: Path) -> None:
        runs = load_runs([write_suite(tmp_path / "all")])
        one, two = (accuracy_figure(runs, tmp_path / name) for name in ("one.png", "two.png"))
        assert png_size(one)[0] == 1800
        assert one.read_bytes() == two.read_bytes()
        assert set(png_chunks(one)) == {"IHDR", "pHYs", "PLTE", "IDAT", "IEND"}

    def test_users_settings_do_not_enter(self, tmp_path: Path) -> None:
        import matplotlib

        runs = load_runs([write_suite(tmp_path / "all")])
        plain = accuracy_figure(runs, tmp_path / "plain.png").read_bytes()
        with matplotlib.rc_context({"lines.linewidth": 7, "font.size": 30, "savefig.transparent": True}):
            assert accuracy_figure(runs, tmp_path / "odd.png").read_bytes() == plain
            assert matplotlib.rcParams["font.size"] == 30

    def test_methods_differ_in_colour_and_marker(self, tmp_path: Path) -> None:
        for index in range(12):
            write_run(tmp_path / str(index), f"Press{index} 50%", **press(f"Press{index}", 0.5))
        write_run(tmp_path / "base", "DynamicCache")
        styles = method_styles(group_runs(load_runs([tmp_path])))
        assert len({(style.colour, style.marker) for style in styles.values()}) == 13
        assert (styles["DynamicCache"].colour, styles["DynamicCache"].marker) == ("#000000", "*")

    def test_bars_for_few_runs_and_a_heat_table_for_many(self, tmp_path: Path) -> None:
        few = group_runs(load_runs([write_run(tmp_path / "few", "DynamicCache").parent]))[0]
        many = group_runs(load_runs([write_suite(tmp_path / "many")]))[0]
        bars = tasks_figure(few, tmp_path / "bars.png", method_styles([few]))
        heat = tasks_figure(many, tmp_path / "heat.png", method_styles([many]))
        assert png_size(bars) == (1800, 840)
        assert png_size(heat) == (1800, 2 * 100 * (1.7 + 0.3 * 6))

    def test_needle_cells_are_means_on_a_fixed_scale(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from pikv_hf.eval.report import figure_needle

        drawn = []
        draw = figure_needle.draw_cells

        def record(axes: Any, scores: list[list[float | None]], limits: tuple[float, float]) -> Any:
            drawn.append((scores, limits))
            return draw(axes, scores, limits)

        monkeypatch.setattr(figure_needle, "draw_cells", record)
        rows = needle_rows((0.0, 0.5, 1.0), (512, 1024))
        for row, score in zip(rows, (1, 0, 0.5, 1, 0, 0.25), strict=True):
            row["score"] = float(score)
        rows = [*rows[:5], {**rows[0], "id": "again", "score": 0.5}]
        [group] = group_runs(load_runs([write_run(tmp_path / "run", "x", rows, dataset="needle", data_dir="")]))
        needle_figure(group, tmp_path / "needle.png")
        assert drawn == [([[75.0, 0.0], [50.0, 100.0], [0.0, None]], (0.0, 100.0))]

    @pytest.mark.parametrize("label", ["$x^$", "_hidden", "$\\frac{1}{2}$", "{", "x" * 200, "多言語"])
    @pytest.mark.filterwarnings("ignore:Glyph")
    def test_any_label_can_be_drawn(self, tmp_path: Path, label: str) -> None:
        runs = load_runs([write_run(tmp_path / "run", label)])
        assert png_size(accuracy_figure(runs, tmp_path / "figure.png"))[0] == 1800

    def test_wrapped_labels_keep_their_ends(self) -> None:
        lines = wrap("ObservedAttentionPress with a long name indeed and more of it on a QuantizedCache 75%", 20).split(
            "\n"
        )
        assert len(lines) <= 3
        assert lines[0].startswith("ObservedAttention")
        assert lines[-1].endswith("75%")
        assert max(map(len, lines)) <= 20


class TestPage:
    def test_writes_page_figures_and_table(self, tmp_path: Path) -> None:
        runs = load_runs([write_suite(tmp_path / "all")])
        page = write_report(runs, tmp_path / "out", title="My title")
        names = {path.name for path in page.parent.iterdir()}
        assert names == {
            "report.html",
            "ratios.md",
            "table.md",
            *(f"ruler-1024-{figure}.png" for figure in ("accuracy", "tasks", "speed")),
        }
        assert (page.parent / "table.md").read_text() == markdown_table(runs)
        text = page.read_text()
        assert "<title>My title</title>" in text
        assert text.count("<img ") == text.count("<figcaption>") == 3
        for shown in (
            "80.0 (77.0–82.0)",
            "SnapKV 75%: 12 of 20",
            "0123456789abcdef",
            "processor Test CPU",
            "torch 2.13.0",
        ):
            assert shown in text

    def test_page_repeats_exactly_wherever_it_is_written(self, tmp_path: Path) -> None:
        outputs = []
        for name in ("here", "there"):
            runs = load_runs([write_suite(tmp_path / name / "results")])
            outputs.append(write_report(runs, tmp_path / name / "out").parent)
        one, two = ({path.name: path.read_bytes() for path in output.iterdir()} for output in outputs)
        assert one == two

    def test_page_loads_nothing(self, tmp_path: Path) -> None:
        text = write_report(load_runs([write_suite(tmp_path / "all")]), tmp_path / "out").read_text()
        assert "http://" not in text
        assert "https://" not in text
        assert "url(" not in text
        assert "<script" not in text
        assert str(tmp_path) not in text

    def test_hostile_texts_are_escaped(self, tmp_path: Path) -> None:
        rows = [{**row, "question": HOSTILE} for row in question_rows(answer=f"{HOSTILE}\u202e\x00")]
        run = write_run(tmp_path / "run", f"{HOSTILE}\ud800", rows, model=f"m{HOSTILE}", press=HOSTILE)
        edit(run / "summary.json", "provenance.command", f'" onload="x" {HOSTILE}')
        edit(run / "summary.json", "provenance.machine.gpu", HOSTILE)
        text = write_report(load_runs([run]), tmp_path / "out", title=HOSTILE).read_text(encoding="utf-8")
        assert "<script" not in text
        assert text.count("&lt;script&gt;document.title=&#39;ran&#39;&lt;/script&gt;") >= 9
        assert 'onload="x"' not in text
        assert not {"\u202e", "\x00"} & set(text)

    def test_needle_and_perplexity_runs_have_their_figures(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        rows = needle_rows([index / 4 for index in range(5)], (512, 1024, 2048))
        write_run(tmp_path / "in" / "needle", "DynamicCache", rows, dataset="needle", data_dir="")
        write_run(
            tmp_path / "in" / "text", "DynamicCache", window_rows(), dataset="perplexity", data_dir="", measure=measure
        )
        page = write_report(load_runs([tmp_path / "in"]), tmp_path / "out")
        figures = {path.name for path in page.parent.glob("*.png")}
        kinds = {"needle": ("accuracy", "needle", "speed"), "perplexity": ("accuracy", "speed")}
        assert figures == {f"{group}-{kind}.png" for group, names in kinds.items() for kind in names}

    def test_runs_without_measured_bytes_are_named(self, tmp_path: Path) -> None:
        parent = write_suite(tmp_path / "all")
        edit(parent / "e" / "summary.json", "cost.kv_share_prefill", None)
        text = write_report(load_runs([parent]), tmp_path / "out").read_text()
        assert "Not shown, since their bytes were not measured: PiKVCache." in text

    def test_needs_runs_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="at least one run"):
            write_report([], tmp_path)
        (tmp_path / "file").write_text("")
        runs = load_runs([write_run(tmp_path / "run", "x")])
        with pytest.raises(InputError, match="file is a file, expected a folder"):
            write_report(runs, tmp_path / "file")
