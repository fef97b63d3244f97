"""Reports: methods by budgets, what their runs have in common said once, and the figure of them."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_folders import edit, press, question_rows, write_run, write_suite

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import accuracy_figure, load_runs
from pikv_hf.eval.report.figure_accuracy import SHAPES
from pikv_hf.eval.report.groups import group_runs
from pikv_hf.eval.report.overview import Block, blocks
from pikv_hf.eval.report.page_tables import budget_grid, task_grids
from pikv_hf.eval.report.svg_axes import Axis, halvings, round_step
from pikv_hf.eval.report.svg_labels import LETTER, LINE, place_labels

PAGED = "recent_window=0,sink_tokens=0,num_shards="
RESULTS = Path(__file__).parents[3] / "eval" / "results"
SVG = "{http://www.w3.org/2000/svg}"


def block_of(folder: Path) -> Block:
    [block] = blocks(group_runs(load_runs([folder])))
    return block


def pressed(folder: Path, name: str, ratio: float, options: str | None = None, **changes: Any) -> None:
    """A run of a press on DynamicCache, or on PiKVCache with options, labelled as `pikv eval` does."""
    on = "" if options is None else f" on PiKVCache {options.replace(',', ' ')}".rstrip()
    cache = "dynamic" if options is None else f"pikv:{options}" if options else "pikv"
    label = f"{name} {100 * ratio:.4g}%{on}{' (query-aware)' * changes.get('query_aware', False)}"
    write_run(
        folder / f"run-{len(list(folder.glob('*')))}", label, **{**press(f"{name}Press", ratio, cache=cache), **changes}
    )


class TestNames:
    def test_what_most_have_is_said_once(self, tmp_path: Path) -> None:
        write_run(tmp_path / "full", "DynamicCache", dtype="bfloat16")
        for name in ("A", "B", "C"):
            pressed(tmp_path, name, 0.5, f"{PAGED}1", dtype="bfloat16")
        pressed(tmp_path, "D", 0.5, f"{PAGED}8", dtype="bfloat16")
        pressed(tmp_path, "E", 0.5, dtype="bfloat16")
        pressed(tmp_path, "F", 0.5, "", dtype="bfloat16")
        pressed(tmp_path, "G", 0.5, "page_size=16", dtype="bfloat16")
        pressed(tmp_path, "H", 0.5, f"{PAGED}1", dtype="float32", query_aware=True, batch_size=4)
        block = block_of(tmp_path)
        assert block.common == (
            "Model in bfloat16; question unseen while the context is read; presses on PiKVCache with "
            "recent_window=0, sink_tokens=0, num_shards=1, unless a row says otherwise."
        )
        assert {row.name: row.notes for row in block.rows} == {
            "DynamicCache": (),
            **dict.fromkeys("ABC", ()),
            "D": ("num_shards=8",),
            "E": ("on DynamicCache",),
            "F": ("default options",),
            "G": ("page_size=16", "else default"),
            "H": ("question read with the context", "float32", "batch 4"),
        }

    def test_nothing_else_is_said_where_all_are_alike(self, tmp_path: Path) -> None:
        pressed(tmp_path, "A", 0.5, f"{PAGED}1")
        pressed(tmp_path, "A", 0.75, f"{PAGED}1")
        block = block_of(tmp_path)
        assert [(row.name, row.notes) for row in block.rows] == [("A", ())]
        assert block.common.endswith("presses on PiKVCache with recent_window=0, sink_tokens=0, num_shards=1.")

    def test_models_in_dtypes_of_their_own_share_rows(self, tmp_path: Path) -> None:
        for model, dtype in (("one", "float32"), ("two", "bfloat16")):
            pressed(tmp_path, "A", 0.5, model=model, dtype=dtype)
        block = block_of(tmp_path)
        assert [(row.label, sorted(row.runs)) for row in block.rows] == [("A", [(0, 0.5), (1, 0.5)])]
        assert block.common.startswith("Models: one in float32, two in bfloat16; question")

    def test_caches_are_told_apart_by_their_options(self, tmp_path: Path) -> None:
        for codec in ("int8", "int4"):
            options = f"key_codec={codec},value_codec={codec}"
            write_run(tmp_path / codec, f"PiKVCache {options.replace(',', ' ')}", cache=f"pikv:{options}")
        write_run(tmp_path / "quanto", "QuantizedCache quanto 4 bit", cache="quantized:quanto:4")
        rows = block_of(tmp_path).rows
        assert sorted(row.label for row in rows) == [
            *("PiKVCache, codec=int4", "PiKVCache, codec=int8", "QuantizedCache quanto 4 bit")
        ]

    def test_runs_alike_in_everything_have_their_folders(self, tmp_path: Path) -> None:
        write_run(tmp_path / "one" / "full", "DynamicCache")
        write_run(tmp_path / "two" / "full", "DynamicCache")
        write_run(tmp_path / "two" / "zfull", "DynamicCache")
        assert [row.label for row in block_of(tmp_path).rows] == [
            *("DynamicCache", "DynamicCache, two", "DynamicCache, two")
        ]

    def test_labels_of_any_kind_are_kept(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "PiKVCache of mine", cache="pikv:page_size=16")
        write_run(tmp_path / "b", "Top 10% press 50%", **press("Top", 0.5))
        assert [row.name for row in block_of(tmp_path).rows] == ["PiKVCache of mine", "Top 10% press"]

    def test_rows_of_the_committed_presses_repeat_no_option(self) -> None:
        block = block_of(RESULTS / "presses")
        notes = {note for row in block.rows for note in row.notes}
        assert notes == {"on DynamicCache", "num_shards=8"}
        assert len({row.label for row in block.rows}) == len(block.rows)
        assert sum(len(row.runs) for row in block.rows) == sum(len(group.entries) for group in block.groups)


class TestOrder:
    def test_baseline_then_caches_then_presses_from_the_best(self, tmp_path: Path) -> None:
        assert [row.name for row in block_of(write_suite(tmp_path / "all")).rows] == [
            *("DynamicCache", "PiKVCache", "AdaKV(SnapKV)", "SnapKV", "Knorm")
        ]

    def test_a_press_is_compared_at_the_budgets_it_has(self, tmp_path: Path) -> None:
        for name, wrong in (("A", (1, 5)), ("B", (2, 6)), ("C", (0,))):
            for ratio, each in zip((0.5, 0.75), wrong, strict=False):
                pressed(tmp_path, name, ratio, score={"mean": 100.0 - 10 * each, "low": 0.0, "high": 100.0})
        assert [row.name for row in block_of(tmp_path).rows] == ["C", "A", "B"], "C has the easy budget alone"

    def test_many_caches_come_after_the_presses(self, tmp_path: Path) -> None:
        write_run(tmp_path / "full", "DynamicCache")
        for size in (8, 16, 32):
            write_run(tmp_path / str(size), f"PiKVCache page_size={size}", cache=f"pikv:page_size={size}")
        for name in ("A", "B"):
            pressed(tmp_path, name, 0.5)
        assert [row.name for row in block_of(tmp_path).rows][:3] == ["DynamicCache", "A", "B"]

    def test_blocks_with_more_runs_come_first(self, tmp_path: Path) -> None:
        write_run(tmp_path / "short", "DynamicCache", data_dir="512")
        write_suite(tmp_path / "all")
        titles = [block.title for block in blocks(group_runs(load_runs([tmp_path])))]
        assert titles == ["ruler 1024, reference", "ruler 512, reference"]


class TestBest:
    def looks(self, folder: Path) -> dict[str, list[tuple[str, str]]]:
        return {
            row.name: [(cell.text, cell.look) for cell in cells] for _, row, cells in budget_grid(block_of(folder)).rows
        }

    def test_best_keeps_its_budget(self, tmp_path: Path) -> None:
        looks = self.looks(write_suite(tmp_path / "all"))
        assert looks["AdaKV(SnapKV)"][1] == ("70.0", "best"), "half of the bytes in the model's own dtype"
        assert looks["SnapKV"][1:] == [("60.0", ""), ("40.0", "")], "alone at its budget it is the best of nothing"
        assert looks["DynamicCache"][0] == ("80.0", ""), "without a budget there is no best"

    def test_equals_are_both_best_and_more_bytes_are_not(self, tmp_path: Path) -> None:
        for name, share, wrong in (("A", 0.55, 2), ("B", 0.5, 2), ("C", 0.551, 0), ("D", 0.4, 3)):
            folder = tmp_path / name
            rows = question_rows(wrong=wrong)
            write_run(folder, f"{name} 50%", rows, **press(f"{name}Press", 0.5, share=share))
            edit(folder / "summary.json", "cost.kv_share_prefill_dtype", share)
        looks = self.looks(tmp_path)
        assert {name: each[0] for name, each in looks.items()} == {
            "A": ("80.0", "best"), "B": ("80.0", "best"), "C": ("100.0†", "over"), "D": ("70.0", ""),
        }  # fmt: skip

    def test_bytes_are_in_the_models_own_dtype(self, tmp_path: Path) -> None:
        for name, share in (("A", 0.5), ("B", 0.6)):
            write_run(tmp_path / name, f"{name} 50%", dtype="float32", **press(f"{name}Press", 0.5, share=2 * share))
            edit(tmp_path / name / "summary.json", "cost.kv_share_prefill_dtype", share)
        assert {name: each[0][0] for name, each in self.looks(tmp_path).items()} == {"A": "80.0", "B": "80.0†"}

    def test_runs_of_two_dtypes_are_compared_in_bf16(self, tmp_path: Path) -> None:
        for name, dtype, share in (("A", "bfloat16", 0.5), ("B", "float32", 1.0)):
            write_run(tmp_path / name, f"{name} 50%", dtype=dtype, **press(f"{name}Press", 0.5, share=share))
            edit(tmp_path / name / "summary.json", "cost.kv_share_prefill_dtype", 0.5)
        looks = {each[0] for each in self.looks(tmp_path).values()}
        assert looks == {("80.0", ""), ("80.0†", "over")}


class TestTasks:
    def test_one_table_per_budget_with_the_mean(self, tmp_path: Path) -> None:
        grids = dict(task_grids(block_of(write_suite(tmp_path / "all"))))
        assert list(grids) == ["all", "50%", "25%"]
        quarter = grids["25%"]
        assert [column.name for column in quarter.columns] == ["niah_single_1", "vt", "mean"]
        [(_, row, cells)] = quarter.rows
        assert (row.name, [(cell.text, cell.look) for cell in cells]) == ("SnapKV", [("40.0", "h4")] * 3)


class TestFigure:
    def drawn(self, folder: Path, out: Path) -> ElementTree.Element:
        return ElementTree.fromstring(accuracy_figure(load_runs([folder]), out).read_text(encoding="utf-8"))

    def test_every_measured_run_has_a_mark_that_says_what_it_is(self, tmp_path: Path) -> None:
        edit(write_suite(tmp_path / "all") / "e" / "summary.json", "cost.kv_share_prefill", None)
        figure = self.drawn(tmp_path / "all", tmp_path / "figure.svg")
        titles = [title.text for title in figure.iter(f"{SVG}title")]
        assert sorted(titles) == [
            "AdaKV(SnapKV), 50% asked for: 70.0 (67.0–72.0) at 100.0% of the bytes",
            "DynamicCache: 80.0 (77.0–82.0) at 100.0% of the bytes",
            "Knorm, 50% asked for: 30.0 (27.0–32.0) at 50.0% of the bytes",
            "SnapKV, 25% asked for: 40.0 (37.0–42.0) at 25.0% of the bytes",
            "SnapKV, 50% asked for: 60.0 (57.0–62.0) at 50.0% of the bytes",
        ]
        assert len(list(figure.iter(f"{SVG}circle"))) == 3, "rings around the Pareto front"

    def test_marks_are_where_bytes_and_scores_are(self, tmp_path: Path) -> None:
        figure = self.drawn(write_suite(tmp_path / "all"), tmp_path / "figure.svg")
        places = {}
        for path in figure.iter(f"{SVG}path"):
            for title in path.iter(f"{SVG}title"):
                x, y = path.attrib["transform"].removeprefix("translate(").removesuffix(")").split()
                places[str(title.text).split(":")[0]] = float(x), float(y)
        full, half, quarter = (
            places[name] for name in ("DynamicCache", "SnapKV, 50% asked for", "SnapKV, 25% asked for")
        )
        # Halvings are equally far apart, and so are 80, 60 and 40 points; places are rounded to 0.1.
        assert full[0] - half[0] == pytest.approx(half[0] - quarter[0], abs=0.2)
        assert full[0] > half[0]
        assert half[1] - full[1] == pytest.approx(quarter[1] - half[1], abs=0.2)
        assert full[1] < half[1]

    def test_colours_are_few_and_each_has_a_shape(self, tmp_path: Path) -> None:
        write_run(tmp_path / "full", "DynamicCache")
        for index in range(12):
            pressed(tmp_path, f"Press{index}", 0.5)
        styles = [row.style for row in block_of(tmp_path).rows]
        assert styles[0] == "base"
        assert sorted(filter(None, styles[1:])) == [f"c{index}" for index in range(6)]
        assert len(set(SHAPES.values())) == len(SHAPES) == 8

    @pytest.mark.parametrize("label", ["$x^$", "_hidden", "<b>&\"'", "{{ 1 }}", "x" * 200, "多言語"])
    def test_any_label_can_be_drawn_and_repeats(self, tmp_path: Path, label: str) -> None:
        write_run(tmp_path / "in" / "full", label)
        write_run(tmp_path / "in" / "half", f"{label} 50%", **press("P", 0.5))
        figure = self.drawn(tmp_path / "in", tmp_path / "one.svg")
        assert {str(title.text).split(":")[0].split(", 50%")[0] for title in figure.iter(f"{SVG}title")} >= {label}
        again = accuracy_figure(load_runs([tmp_path / "in"]), tmp_path / "two.svg")
        assert again.read_bytes() == (tmp_path / "one.svg").read_bytes()

    def test_names_that_begin_alike_are_told_apart(self, tmp_path: Path) -> None:
        for index in range(3):
            pressed(
                tmp_path,
                f"AVeryLongNameOfAPressThatIsNumber{index}WithMore",
                0.5,
                score={"mean": 30.0 * index, "low": 0, "high": 90},
            )
        figure = self.drawn(tmp_path, tmp_path / "figure.svg")
        texts = [text.text for text in figure.iter(f"{SVG}text")]
        assert sum(f"umber{index}" in str(text) for index in range(3) for text in texts) == 3

    def test_one_data_set_with_measured_bytes_is_needed(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a" / "a", "DynamicCache", share=None)
        with pytest.raises(InputError, match="whose bytes were measured, got none"):
            accuracy_figure(load_runs([tmp_path / "a"]), tmp_path / "figure.svg")
        write_run(tmp_path / "a" / "b", "DynamicCache", data_dir="2048")
        with pytest.raises(InputError, match="one data set, length and model, got 2"):
            accuracy_figure(load_runs([tmp_path / "a"]), tmp_path / "figure.svg")


class TestDrawing:
    @given(st.floats(1e-6, 1e6), st.floats(1.001, 1e3), st.integers(2, 9))
    def test_ticks_are_round_inside_and_not_too_many(self, low: float, factor: float, most: int) -> None:
        axis = Axis(low, low * factor, 0, 100)
        ticks = axis.ticks(most)
        assert len(ticks) <= most + 1
        assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)
        step = round_step((axis.high - axis.low) / most)
        assert f"{step:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")

    @given(st.floats(0.01, 1e3), st.floats(1.01, 1e4))
    def test_halvings_are_all_between_the_ends(self, low: float, factor: float) -> None:
        ticks = halvings(low, low * factor)
        assert all(two == 2 * one for one, two in itertools.pairwise(ticks))
        assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)
        if ticks:
            assert ticks[0] / 2 < low
            assert 2 * ticks[-1] > low * factor
        else:
            assert factor < 2

    @given(st.booleans(), st.floats(0.5, 200))
    def test_places_go_from_end_to_end(self, log: bool, value: float) -> None:
        axis = Axis(1, 100, 40, 466, log)
        assert axis.place(1) == 40
        assert axis.place(100) == pytest.approx(466)
        assert 40 <= axis.place(value) <= 466 + 1e-9

    point = st.tuples(st.floats(40, 460), st.floats(30, 340))

    @given(st.lists(st.lists(point, min_size=1, max_size=4), min_size=1, max_size=8))
    def test_labels_cover_neither_points_nor_labels(self, lines: list[list[tuple[float, float]]]) -> None:
        points = [place for line in lines for place in line]
        placed = place_labels(
            [(f"method {index}", line) for index, line in enumerate(lines)], points, [], (40, 20, 470, 344)
        )
        boxes = []
        for label in filter(None, placed):
            width = LETTER * len(label.text)
            left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
            boxes.append((left, label.y - 0.8 * LINE, left + width, label.y + 0.2 * LINE))
        for left, top, right, bottom in boxes:
            assert 40 <= left <= right <= 470
            assert 20 <= top <= bottom <= 344
            assert not any(left < x < right and top < y < bottom for x, y in points)
        for one, other in itertools.combinations(boxes, 2):
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])

    def test_of_free_places_a_label_takes_the_one_that_covers_no_line(self) -> None:
        frame, own = (0.0, 0.0, 200.0, 200.0), [(100.0, 100.0)]
        [free] = place_labels([("name", own)], own, [], frame)
        [beside] = place_labels([("name", own)], own, [(80.0, 100.0), (70.0, 100.0)], frame)
        assert free is not None
        assert beside is not None
        assert (free.anchor, beside.anchor) == ("end", "middle")
        assert place_labels([("n" * 99, own)], own, [], frame) == [None]
