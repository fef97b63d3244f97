"""Reports: figures and pages, which repeat exactly."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from report_folders import HOSTILE, edit, needle_rows, press, question_rows, window_rows, write_run, write_suite

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import accuracy_figure, load_runs, markdown_table, write_report
from pikv_hf.eval.report.figure_needle import needle_figure
from pikv_hf.eval.report.figure_tasks import tasks_figure
from pikv_hf.eval.report.groups import group_runs
from pikv_hf.eval.report.style import method_styles, wrap

pytestmark = pytest.mark.slow


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
