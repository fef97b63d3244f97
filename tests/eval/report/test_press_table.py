"""The table of presses at equal bytes: the committed results are complete, and docs/presses.md shows what they give."""

import struct
from pathlib import Path

import pytest
from report_folders import question_rows, write_run
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import budget_figure, budget_table, load_runs
from pikv_hf.eval.report.budgets import CACHE, CONTROL, SHARDED, TOLERANCE, VARIANTS, methods, one_group
from pikv_hf.eval.report.figure_budgets import best_others, spread
from pikv_hf.eval.runner.options import read_options
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.eval.tasks import reference

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results" / "presses"

committed = pytest.mark.skipif(
    not RESULTS.is_dir(), reason="eval/results/presses is not there: `make presses` has not been run"
)


# What is committed


@committed
def test_the_docs_show_the_table_of_the_committed_results() -> None:
    assert budget_table(load_runs([RESULTS])) in (ROOT / "docs" / "presses.md").read_text()


@committed
def test_committed_results_are_complete() -> None:
    """A run may be missing only if its press failed, which docs/presses.md then has to say."""
    asked = {(run.press, run.cache, run.ratio) for run in read_options(ROOT / "eval" / "presses.yaml")}
    summaries = [run.summary for run in load_runs([RESULTS])]
    found = {(s.press, s.cache, s.compression_ratio or None) for s in summaries}
    assert found <= asked
    failed = {press for press, _, _ in asked - found}
    assert all(f"`{press}` fails" in (ROOT / "docs" / "presses.md").read_text() for press in failed), failed
    assert {s.conditions["dtype"] for s in summaries} == {"bfloat16"}
    for summary in summaries:
        each = 60 if summary.press in (None, "PiKVPress") else 20
        assert summary.samples == each * len(reference.TASKS)


@committed
def test_committed_bytes_are_what_was_asked_for() -> None:
    for run in load_runs([RESULTS]):
        summary = run.summary
        assert summary.cost.kv_share_prefill is not None
        if summary.press == "PiKVPress":
            assert summary.cost.kv_share_prefill <= 1 - summary.compression_ratio
        elif summary.cache == "dynamic":
            assert summary.cost.kv_share_prefill == pytest.approx(1 - summary.compression_ratio, abs=0.002)


# What is asked for


def test_all_runs_of_the_grid_can_be_made() -> None:
    runs = read_options(ROOT / "eval" / "presses.yaml")
    assert {run.dtype for run in runs} == {"bfloat16"}
    assert len({(run.press, run.cache, run.ratio) for run in runs}) == len(runs)
    for run in runs:
        if run.press is not None:
            assert press_factory(run.press, run.ratio).ratio == run.ratio


def test_all_variants_and_the_control_are_in_the_grid() -> None:
    runs = {(run.press, run.cache) for run in read_options(ROOT / "eval" / "presses.yaml")}
    assert set(VARIANTS.values()) | {(CONTROL, CACHE)} <= runs
    assert sorted(VARIANTS) == list("ABCDEFG")


# The table, of results made up


@pytest.fixture
def results(tmp_path: Path) -> Path:
    def run(name: str, press: str | None, ratio: float, mean: float, share: float, cache: str = CACHE) -> None:
        changes = {"press": press, "compression_ratio": ratio, "cache": cache, "share": share}
        score = {"mean": mean, "low": mean - 1, "high": min(100.0, mean + 1)}
        write_run(tmp_path / name, name, score=score, **changes)

    run("full", None, 0, 99.8, 1.0, "dynamic")
    run("pages", None, 0, 99.8, 1.016)
    for ratio, mean in ((0.5, 99.0), (0.75, 98.04), (0.975, 40.0)):
        run(f"ours-{ratio}", "PiKVPress", ratio, mean, 1 - ratio)
    run("control", CONTROL, 0.75, 50.0, 0.27)
    run("expert", "ExpertPress", 0.75, 60.0, 0.27)
    run("duo", "DuoPress", 0.75, 70.0, 0.274)
    run("pyramid", "PyramidPress", 0.75, 71.0, 0.274, SHARDED)
    run("lora", "ComposedPress([LoRAPress, SnapKVPress])", 0.75, 72.0, 0.2, CACHE)
    run("snap-0.5", "SnapKVPress", 0.5, 99.04, 0.5, "dynamic")
    run("snap-0.75", "SnapKVPress", 0.75, 80.0, 0.25, "dynamic")
    run("snap-paged", "SnapKVPress", 0.75, 81.0, 0.25)
    run("greedy", "AdaKVPress(SnapKVPress)", 0.75, 99.9, 0.25 * (1 + TOLERANCE) + 0.001)
    return tmp_path


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in lines}


def test_rows_come_in_order_and_say_what_they_are(results: Path) -> None:
    table = cells(budget_table(load_runs([results])))
    assert list(table)[2:] == [
        "DynamicCache (G)",
        "PiKVCache",
        "PiKVPress",
        "DuoPress (A) (F)",
        "ExpertPress",
        'ExpertPress(router="random") (control)',
        "PyramidPress",
        r"ComposedPress(\[LoRAPress, SnapKVPress\])",
        "AdaKVPress(SnapKVPress) on PiKVCache",
        "SnapKVPress",
        "SnapKVPress on PiKVCache",
    ]


def test_cells_have_scores_at_measured_bytes(results: Path) -> None:
    table = cells(budget_table(load_runs([results])))
    assert table["score (%) at KV bytes"] == ["all", "50%", "25%", "2.5%"]
    assert table["PiKVCache"] == ["99.8 at 101.6%", "–", "–", "–"]
    assert table["DuoPress (A) (F)"] == ["–", "–", "70.0 at 27.4%", "–"]
    assert table["PiKVPress"][3] == "40.0 at 2.5%", "alone in its column it is not the best of anything"


def test_the_best_within_the_budget_is_bold(results: Path) -> None:
    table = cells(budget_table(load_runs([results])))
    assert table["PiKVPress"][1:3] == ["**99.0 at 50.0%**", "**98.0 at 25.0%**"]
    assert table["SnapKVPress"][1] == "**99.0 at 50.0%**", "equal as shown"
    assert table["AdaKVPress(SnapKVPress) on PiKVCache"][2] == "99.9 at 27.6%", "more bytes than the others"


def test_runs_of_several_lengths_are_refused(results: Path) -> None:
    write_run(results / "long", "DynamicCache", data_dir="2048")
    with pytest.raises(InputError, match=r"one data set, length and model, got 2: ruler 1024.*ruler 2048"):
        budget_table(load_runs([results]))


def test_the_command_writes_table_and_figure(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    output = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(app, ["report", "budgets", str(results), "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert done.output == (output / "budgets.md").read_text() == budget_table(load_runs([results]))
    assert struct.unpack(">II", (output / "budgets.png").read_bytes()[16:24]) == (1800, 920)
    first = (output / "budgets.png").read_bytes()
    assert budget_figure(load_runs([results]), output / "again.png").read_bytes() == first
    missing = CliRunner().invoke(app, ["report", "budgets", str(results / "nowhere")])
    assert (missing.exit_code, "is not a folder" in missing.output) == (2, True)


def test_the_figure_names_the_best_of_the_others(results: Path, tmp_path: Path) -> None:
    found = methods(one_group(load_runs([results])))
    pressed = [method for method in found if method.press is not None]
    # A press with one budget more is compared by the budgets that all complete ones have.
    assert [method.label for method in best_others(pressed)] == ["SnapKVPress"]
    for ratio, mean in ((0.5, 99.9), (0.75, 10.0)):
        score = {"mean": mean, "low": mean, "high": mean}
        given = {"press": "KnormPress", "compression_ratio": ratio, "score": score}
        write_run(results / f"knorm-{ratio}", "Knorm", question_rows(), **given)
    named = best_others([m for m in methods(one_group(load_runs([results]))) if m.press is not None])
    assert [method.label for method in named] == ["SnapKVPress", "KnormPress"]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([50.0, 10.0], [50.0, 10.0]),
        ([10.0, 10.0], [7.5, 12.5]),
        ([12.0, 10.0, 40.0], [13.5, 8.5, 40.0]),
        ([10.0, 11.0, 14.0], [20 / 3, 35 / 3, 50 / 3]),
    ],
)
def test_labels_move_apart_no_more_than_needed(places: list[float], expected: list[float]) -> None:
    assert spread(places, 5.0) == pytest.approx(expected)


def test_no_labels_need_no_room() -> None:
    assert spread([], 5.0) == []
