"""Reports: pages, which are small, repeat exactly and hold what hostile runs say as text."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_folders import HOSTILE, edit, needle_rows, press, question_rows, window_rows, write_run, write_suite

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import load_runs, markdown_table, ratio_table, write_report
from pikv_hf.eval.report.examples import EXAMPLES, EXAMPLES_OF_PAGE

pytestmark = pytest.mark.slow


def words(page: str) -> str:
    """The text of a page, elements apart, without line breaks within names."""
    text = re.sub(r"<(style|script).*?</\1>", "", page.replace("<wbr>", ""), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", text)))


def suite_of(folder: Path, runs: int, answer: str) -> Path:
    """As many runs of 20 presses on 13 tasks, all with wrong answers of any length."""
    tasks = [f"niah_multikey_{index}" for index in range(13)]
    rows = question_rows(tasks, samples=4, wrong=2, answer=answer)
    rows = [{**row, "question": 50 * "Why & how <is> it? "} for row in rows]
    write_run(folder / "full", "DynamicCache", rows)
    for index in range(runs - 1):
        name, ratio = f"SomewhatLonger{index // 4}", (0.5, 0.75, 0.875, 0.9375)[index % 4]
        label = f"{name} {100 * ratio:.4g}% on PiKVCache recent_window=0 sink_tokens=0"
        asked = press(f"{name}Press", ratio, cache="pikv:recent_window=0,sink_tokens=0")
        write_run(folder / f"run-{index}", label, rows, **asked)
    return folder


class TestPage:
    def test_writes_page_figure_and_tables(self, tmp_path: Path) -> None:
        runs = load_runs([write_suite(tmp_path / "all")])
        page = write_report(runs, tmp_path / "out", title="My title")
        names = {path.name for path in page.parent.iterdir()}
        assert names == {"report.html", "ratios.md", "table.md", "ruler-1024-accuracy.svg"}
        assert (page.parent / "table.md").read_text() == markdown_table(runs)
        assert (page.parent / "ratios.md").read_text() == ratio_table(runs)
        text = page.read_text()
        assert "<title>My title</title>" in text
        for shown in (
            "6 runs, 2 tasks, 20 samples each. Question unseen while the context is read; presses on DynamicCache.",
            "SnapKV – 60.0 57–62 40.0 37–42",
            "SnapKV, 25% kept: 12 of 20 below full score",
            "commit 0123456789abcdef machine processor Test CPU",
            "torch 2.13.0",
        ):
            assert shown in words(text)

    def test_parts_come_in_order(self, tmp_path: Path) -> None:
        text = write_report(load_runs([write_suite(tmp_path / "all")]), tmp_path / "out").read_text()
        parts = ["svg class=\"accuracy\"", "Scores by method and budget", "<h3>Tasks", "<h3>Speed", "<h3>Memory",
                 "<h2>Every run", "<h2>How it was measured"]  # fmt: skip
        places = [text.index(part) for part in parts]
        assert places == sorted(places)
        runs = text[places[-2] : places[-1]]
        assert "<details open" not in runs
        assert runs.count('<details class="run"') == 6

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
        assert text.count("<script") == 1
        assert re.search(r"script-src 'sha256-[\w+/]{43}='\"", text), "no script but this one may run"
        assert str(tmp_path) not in text

    def test_hostile_texts_are_escaped(self, tmp_path: Path) -> None:
        rows = [{**row, "question": HOSTILE} for row in question_rows(answer=f"{HOSTILE}\u202e\x00")]
        for name, changes in (("run", {}), ("other", press(HOSTILE, 0.5))):
            run = write_run(tmp_path / "in" / name, f"{HOSTILE}\ud800{name}", rows, model=f"m{HOSTILE}", **changes)
            edit(run / "summary.json", "provenance.command", f'" onload="x" {HOSTILE}')
            edit(run / "summary.json", "provenance.machine.gpu", HOSTILE)
        out = write_report(load_runs([tmp_path / "in"]), tmp_path / "out", title=HOSTILE)
        text = out.read_text(encoding="utf-8")
        assert text.count("<script") == 1
        assert words(text).count(HOSTILE) >= 20
        assert 'onload="x"' not in text
        assert not {"\u202e", "\x00"} & set(text)
        figure = (out.parent / "ruler-1024-accuracy.svg").read_text(encoding="utf-8")
        assert HOSTILE in unescape(figure)
        assert "<script" not in figure

    @pytest.mark.parametrize("answer", ["no idea", "&" * 5000, "多言語" * 2000])
    def test_80_runs_make_less_than_a_megabyte(self, tmp_path: Path, answer: str) -> None:
        page = write_report(load_runs([suite_of(tmp_path / "in", 80, answer)]), tmp_path / "out")
        assert page.stat().st_size < 1_000_000
        examples = page.read_text(encoding="utf-8").count('<dl class="example"')
        assert examples == 80 * min(EXAMPLES, EXAMPLES_OF_PAGE // 80)

    def test_runs_without_samples_are_counted(self, tmp_path: Path) -> None:
        parent = write_suite(tmp_path / "all")
        (parent / "e" / "predictions.csv").unlink()
        text = write_report(load_runs([parent]), tmp_path / "out").read_text()
        assert "The samples of 1 of 6 runs were not kept" in text

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


class TestKinds:
    """Of suites: each has the parts it needs and no others."""

    def parts(self, folder: Path) -> tuple[str, set[str]]:
        out = write_report(load_runs([folder]), folder.parent / f"{folder.name}-out")
        text = out.read_text(encoding="utf-8")
        return words(text), set(re.findall(r"<h3>(\w+)", text)) | {path.name for path in out.parent.glob("*.svg")}

    def test_a_single_run_has_a_row_and_no_figure(self, tmp_path: Path) -> None:
        write_run(tmp_path / "in" / "run", "DynamicCache")
        text, parts = self.parts(tmp_path / "in")
        assert parts == {"Tasks", "Speed", "Memory"}
        assert "cache score (%) 95% interval KV bytes of bf16 DynamicCache 80.0 77–82 100.0%" in text

    def test_one_method_with_one_budget(self, tmp_path: Path) -> None:
        write_run(tmp_path / "in" / "full", "DynamicCache")
        write_run(tmp_path / "in" / "half", "SnapKV 50%", **press("SnapKVPress", 0.5))
        text, parts = self.parts(tmp_path / "in")
        assert "ruler-1024-accuracy.svg" in parts
        assert "score (%) all 100% 50% 50% DynamicCache 80.0 77–82 – SnapKV – 80.0 77–82" in text

    def test_what_was_not_measured_has_no_part(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "in" / "run", "DynamicCache", share=None)
        for name in ("decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes"):
            edit(folder / "summary.json", f"cost.{name}", None)
        text, parts = self.parts(tmp_path / "in")
        assert parts == {"Tasks"}
        assert "DynamicCache 80.0 77–82 –" in text

    def test_needles_have_a_table_per_run(self, tmp_path: Path) -> None:
        rows = needle_rows((0.0, 0.5, 1.0), (512, 1024))
        for row, score in zip(rows, (1, 0, 0.5, 1, 0, 0.25), strict=True):
            row["score"] = float(score)
        # Two samples of one cell, and a cell without any.
        rows = [*rows[:5], {**rows[0], "id": "again", "score": 0.5}]
        write_run(tmp_path / "in" / "full", "DynamicCache", rows, dataset="needle", data_dir="")
        write_run(
            tmp_path / "in" / "half", "SnapKV 50%", rows, dataset="needle", data_dir="", **press("SnapKVPress", 0.5)
        )
        text, parts = self.parts(tmp_path / "in")
        assert parts == {"Needles", "Speed", "Memory", "needle-accuracy.svg"}
        assert "DynamicCache depth 512 1,024 0% 75 0 50% 50 100 100% 0 –" in text
        assert "SnapKV, 50% kept depth 512 1,024 0% 75 0" in text

    def test_perplexities_are_best_where_they_are_low(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        runs: list[tuple[str, float, dict[str, Any]]] = [
            ("DynamicCache", 2.0, {}),
            ("Good 50%", 2.125, press("GoodPress", 0.5)),
            ("Bad 50%", 3.5, press("BadPress", 0.5)),
        ]
        for label, mean, changes in runs:
            score = {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}
            given = {"dataset": "perplexity", "data_dir": "", "measure": measure, "score": score, **changes}
            write_run(tmp_path / "in" / label, label, window_rows(), **given)
        text, parts = self.parts(tmp_path / "in")
        assert parts == {"Speed", "Memory", "perplexity-accuracy.svg"}
        assert "Good – 2.125 1.625–2.625 Bad – 3.500 3.000–4.000" in text
        page = (tmp_path / "in-out" / "report.html").read_text()
        assert re.findall(r'class="best"[^>]*>([\d.]+)', page) == ["2.125"]

    def test_two_models_stand_side_by_side(self, tmp_path: Path) -> None:
        for model, wrong in (("small", 1), ("/data/large", 4)):
            name = model.strip("/").replace("/", "-")
            write_run(tmp_path / "in" / f"{name}-full", "DynamicCache", model=model)
            write_run(
                tmp_path / "in" / f"{name}-half", "SnapKV 50%", question_rows(wrong=wrong), model=model,
                **press("SnapKVPress", 0.5),
            )  # fmt: skip
        text, parts = self.parts(tmp_path / "in")
        assert {"ruler-1024-accuracy.svg", "ruler-1024-2-accuracy.svg"} <= parts
        assert "ruler 1024, large and small 4 runs, 2 tasks" in text
        asked = "tokens kept, as asked of presses"
        assert f"large: {asked} small: {asked} score (%) all 100% 50% 50% all 100% 50% 50% DynamicCache" in text
        assert "SnapKV – 60.0 57–62 – 90.0 87–92" in text
