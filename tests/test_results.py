"""The committed baseline: complete, consistent with its own rows, and what docs/evaluation.md shows."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from pikv_hf.eval.report import load_runs, ratio_table
from pikv_hf.eval.runner.options import read_options
from pikv_hf.eval.tasks import reference

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "eval" / "results" / "baseline"


@pytest.fixture(scope="module")
def runs():
    return load_runs([BASELINE])


def test_every_run_of_the_grid_is_there(runs):
    asked = {(run.length, run.cache, run.press, run.ratio) for run in read_options(ROOT / "eval" / "baseline.yaml")}
    found = [(run.summary, json.loads((run.folder / "summary.json").read_text())) for run in runs]
    assert asked == {(int(s.data_dir), s.cache, s.press, s.compression_ratio or None) for s, _ in found}
    assert all(set(s.tasks) == set(reference.TASKS) for s, _ in found)
    assert all(task.samples >= 60 for s, _ in found for task in s.tasks.values())


def test_pikv_gave_the_answer_of_dynamic_cache_on_every_sample(runs):
    full = {run.summary.cache: run.rows for run in runs if run.summary.data_dir == "1024" and not run.summary.press}
    columns = ["id", "predicted_answer", "score"]
    pd.testing.assert_frame_equal(full["pikv"][columns], full["dynamic"][columns])
    assert len(full["pikv"]) == 420


def test_means_are_those_of_the_rows(runs):
    for run in runs:
        means = 100 * run.rows.groupby("task", sort=False)["score"].mean()
        assert run.summary.score.mean == pytest.approx(means.mean(), abs=1e-3)
        assert run.summary.cost.kv_share_prefill == pytest.approx(run.rows["kv_share_prefill"].astype(float).mean())


def test_the_docs_show_this_table(runs):
    table = ratio_table([run for run in runs if run.summary.data_dir == "1024"])
    assert table in (ROOT / "docs" / "evaluation.md").read_text()


def test_results_are_small_enough_for_the_tree():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "eval/results"], capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.exists()) <= 3_000_000
