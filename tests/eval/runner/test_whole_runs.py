"""Whole runs: what is written, resumed, skipped, split over processes, and shown."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from pikv_hf.eval import evaluate_cache
from pikv_hf.eval.cli.main import app
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import load_runs, write_report
from pikv_hf.eval.runner.protocol import Asker
from pikv_hf.eval.runner.run_summary import interval
from pikv_hf.eval.tasks import needle, reference

pytestmark = pytest.mark.slow

SMALL = {"length": 300, "samples": 2, "progress": False}
TIMES = ["prefill_seconds", "decode_seconds", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a complete run with a press, and where it was written."""
    root = tmp_path_factory.mktemp("results")
    return evaluate_cache(cache="dynamic", press="SnapKVPress", ratio=0.5, output=root, **SMALL), root


def test_a_run_leaves_kvpress_files_and_a_summary(finished):
    result, root = finished
    assert result.folder is not None
    assert result.folder.parent == root
    assert sorted(file.name for file in result.folder.iterdir()) == [
        "config.yaml",
        "metrics.json",
        "predictions.csv",
        "summary.json",
    ]
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert (config["dataset"], config["data_dir"], config["press_name"]) == ("ruler", "300", "SnapKVPress")
    assert config["compression_ratio"] == 0.5
    assert config["press_init_command"].startswith("SnapKVPress(compression_ratio=0.5")
    rows = pd.read_csv(result.folder / "predictions.csv")
    # What kvpress's own scorer and leaderboard read.
    assert {
        "question",
        "answer_prefix",
        "answer",
        "task",
        "max_new_tokens",
        "predicted_answer",
        "compression_ratio",
    } < {*rows.columns}
    assert rows["id"].tolist() == [f"{task}-{index:04d}" for task in reference.TASKS for index in range(2)]


def test_every_row_carries_what_was_spent(finished):
    rows = finished[0].rows
    assert rows[[*TIMES, "kv_bytes_prefill", "kv_bytes_end"]].gt(0).all(axis=None)
    # Half of the tokens in fp32 are as many bytes as all of them in bf16; 1 token is at most lost to rounding.
    kept = (rows["context_tokens"] * 0.5).astype(int) / rows["context_tokens"]
    assert rows["kv_share_prefill"].tolist() == pytest.approx((2 * kept).tolist())
    assert rows["kv_share_prefill_dtype"].tolist() == pytest.approx(kept.tolist())
    assert (rows["kv_bytes_end"] > rows["kv_bytes_prefill"]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"suite": "ruler", "wording": "ruler", "length": 1024, "samples": 1},
        {"suite": "longbench", "data_dir": "bundled", "limit": 1},
        {"suite": "longbench", "data_dir": "bundled", "limit": 1, "e": True, "tasks": ["qasper"]},
        {"suite": "needle", "lengths": [300], "depths": [0, 50], "samples": 1},
        {"suite": "perplexity", "length": 600, "samples": 2},
    ],
    ids=lambda options: "-".join([options["suite"], *(["e"] if "e" in options else [])]),
)
def test_every_suite_can_be_reported(tmp_path, options):
    limit = {} if options["suite"] == "perplexity" else {"max_new_tokens": 2}
    result = evaluate_cache(cache="dynamic", output=tmp_path / "results", progress=False, **limit, **options)
    page = write_report(load_runs([tmp_path / "results"]), tmp_path / "report")
    assert result.summary["label"] in page.read_text()
    assert (tmp_path / "report" / "table.md").exists()


def test_means_and_intervals_are_over_tasks(finished):
    result, _ = finished
    by_task = result.rows.groupby("task", sort=False)["score"].mean() * 100
    assert result.summary["score"]["mean"] == pytest.approx(by_task.mean(), abs=1e-3)
    assert {task: entry["mean"] for task, entry in result.summary["tasks"].items()} == pytest.approx(by_task.to_dict())
    assert result.summary["tasks"]["vt"]["metric"] == "exact_match"
    assert result.metrics["niah_single_1"].keys() == {"string_match"}
    assert result.summary["score"]["low"] <= result.summary["score"]["mean"] <= result.summary["score"]["high"]


def test_a_finished_run_is_read_instead_of_repeated(finished, monkeypatch):
    result, root = finished
    # Neither the model nor any sample is needed.
    monkeypatch.setattr("pikv_hf.eval.runner.models.load_reference_model", None)
    monkeypatch.setattr(Asker, "ask", None)
    again = evaluate_cache(cache="dynamic", press="SnapKVPress", ratio=0.5, output=root, **SMALL)
    assert again.skipped
    assert again.summary == result.summary
    assert again.rows["predicted_answer"].fillna("").tolist() == result.rows["predicted_answer"].tolist()


def test_an_interrupted_run_resumes_at_the_next_sample(tmp_path, monkeypatch):
    asked = []
    ask = Asker.ask

    def stop_after_five(self, encoded, cache, press=None):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(encoded)
        return ask(self, encoded, cache, press)

    options = SMALL | {"tasks": ["niah_single_2", "vt"], "samples": 4}
    monkeypatch.setattr(Asker, "ask", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        evaluate_cache(cache="dynamic", output=tmp_path, **options)
    [folder] = tmp_path.iterdir()
    assert not (folder / "summary.json").exists()
    before = len(asked)
    asked.clear()
    monkeypatch.setattr(Asker, "ask", lambda self, *args: (asked.append(args), ask(self, *args))[1])
    resumed = evaluate_cache(cache="dynamic", output=tmp_path, **options)
    # One warm-up in each run is not recorded.
    assert (before, len(asked)) == (5, 8 - (before - 1) + 1)
    whole = evaluate_cache(cache="dynamic", **options)
    pd.testing.assert_frame_equal(resumed.rows.drop(columns=TIMES), whole.rows.drop(columns=TIMES))


@pytest.mark.parametrize(
    "options", [{}, {"query_aware": True}, {"batch_size": 3}, {"batch_size": 3, "query_aware": True}]
)
def test_pikv_answers_every_sample_like_dynamic_cache(options):
    dynamic, pikv = (evaluate_cache(cache=cache, **SMALL, **options) for cache in ("dynamic", "pikv:recent_window=32"))
    columns = ["id", "predicted_answer", "score", "context_tokens", "new_tokens"]
    assert pikv.rows[columns].to_dict() == dynamic.rows[columns].to_dict()
    assert (pikv.rows["kv_bytes_prefill"] != dynamic.rows["kv_bytes_prefill"]).all()


@pytest.mark.parametrize("press", ["SnapKVPress", "AdaKVPress(SnapKVPress)", "PiKVPress", "ExpertPress", "DuoPress"])
def test_a_press_frees_bytes_on_a_pikv_cache(press):
    options = SMALL | {"tasks": ["niah_single_2"], "samples": 1, "dtype": "bfloat16"}
    cache = "pikv:recent_window=0,sink_tokens=0,num_shards=1,page_size=16"
    result = evaluate_cache(cache=cache, press=press, ratio=0.5, **options)
    # Ends of pages, positions and tables come on top of half of the tokens; 300 tokens are few.
    assert 0.4 < result.summary["cost"]["kv_share_prefill"] < 0.65
    assert result.summary["label"] == f"{press.replace('Press', '')} 50% on PiKVCache " + cache[5:].replace(",", " ")


def test_placement_changes_neither_answers_nor_bytes_of_duo():
    options = SMALL | {"tasks": ["niah_single_2", "vt"]}
    results = [
        evaluate_cache(cache=f"pikv:placement={placement}", press="DuoPress", ratio=0.5, **options)
        for placement in ("expert", "hash")
    ]
    one, other = (result.rows[["id", "predicted_answer", "score", "kv_bytes_prefill"]] for result in results)
    pd.testing.assert_frame_equal(one, other)


def test_caches_and_presses_may_be_functions():
    from kvpress import KnormPress
    from transformers import DynamicCache

    result = evaluate_cache(
        cache=lambda model: DynamicCache(), press=lambda: KnormPress(0.5), tasks=["niah_single_1"], **SMALL
    )
    assert result.summary["compression_ratio"] == 0.5
    assert result.folder is None


def test_a_model_object_needs_its_tokenizer(reference_model):
    model, tokenizer = reference_model
    options = SMALL | {"tasks": ["niah_single_1"], "wording": "reference"}
    assert evaluate_cache(model, tokenizer, **options).summary["score"]["mean"] == 100
    with pytest.raises(InputError, match="needs its tokenizer"):
        evaluate_cache(model, **options)
    assert model.config._attn_implementation == "sdpa"


def test_perplexity_gets_worse_with_a_press():
    options = SMALL | {"suite": "perplexity", "length": 600}
    full, pressed = (
        evaluate_cache(cache="dynamic", **options),
        evaluate_cache(cache="dynamic", press="StreamingLLMPress", ratio=0.75, **options),
    )
    assert full.summary["score"]["mean"] == pytest.approx(math.exp(full.rows["score"].mean()), abs=1e-3)
    assert full.summary["score"]["mean"] < 1.2 < pressed.summary["score"]["mean"]
    assert not full.summary["measure"]["higher_is_better"]


def test_needles_are_where_the_grid_says():
    grid = needle.Grid((256, 512), (0.0, 0.5, 1.0), 2, 7)
    samples = needle.reference_samples(grid)
    assert len(samples) == len({sample.id for sample in samples}) == 12
    for sample in samples:
        before = sample.context.index("One of the special magic numbers")
        sentences = sample.context.split("\n")[1].count(".")
        assert sample.context[:before].split("\n")[1].count(".") == round(sample.extra["depth"] * (sentences - 1))
    result = evaluate_cache(suite="needle", lengths=[256], depths=[0, 100], cache="dynamic", samples=1, progress=False)
    assert result.rows["depth"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["niah_multikey_3"]}, "no task 'niah_multikey_3'"),
        ({"length": 20}, "does not fit into --length 20"),
        ({"length": 5000}, "5000 tokens do not fit the model's 4096 positions"),
        ({"model": "/nowhere"}, "no such folder"),
    ],
)
def test_what_cannot_be_evaluated_is_named(options, message):
    with pytest.raises(InputError, match=message):
        evaluate_cache(**{**SMALL, "cache": "dynamic", **options})


@pytest.mark.parametrize("shared", [False, True], ids=["samples divided", "one cache for both"])
def test_two_processes_score_like_one(tmp_path, shared):
    # Without a GPU, --multi_gpu starts the processes and they talk through gloo; with --cpu there would be only one.
    given = ["ruler", "--length", "200", "--samples", "3", "--task", "niah_single_2", "--task", "vt", "--quiet"]
    given += ["--threads", "1"] if shared else ["--press", "RandomPress", "--ratio", "0.25", "--threads", "1"]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    caches = ["--cache", "pikv:process_group=world"] if shared else []
    command = [*launch, "-m", "pikv_hf.eval", *given, *caches, "--output", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    # Only one process reports.
    assert result.stdout.count("mean over tasks") == 1
    caches = ["--cache", "pikv"] if shared else []
    CliRunner().invoke(app, ["eval", *given, *caches, "--output", str(tmp_path / "one")], catch_exceptions=False)
    one, two = (pd.read_csv(next((tmp_path / name).glob("*/predictions.csv"))) for name in ("one", "two"))
    costs = [name for name in one if shared and name.startswith("kv_")]
    pd.testing.assert_frame_equal(two.drop(columns=[*TIMES, *costs]), one.drop(columns=[*TIMES, *costs]))
    if shared:
        # Bytes are those of both processes: everything once, and the window twice.
        assert (two["kv_bytes_end"] > one["kv_bytes_end"]).all()
        assert (two["kv_bytes_end"] < 2 * one["kv_bytes_end"]).all()
    summary = json.loads(next((tmp_path / "two").glob("*/summary.json")).read_text())
    assert summary["processes"] == 2


def test_a_yaml_file_runs_from_the_command_line(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("suite: ruler\nlength: 200\nsamples: 1\ntasks: [vt]\nruns:\n  - cache: [dynamic, pikv]\n")
    result = CliRunner().invoke(app, ["eval", "run", str(file), "--output", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*/summary.json"))) == 2
    assert "PiKVCache on ruler 200, reference (float32), 1 sample" in result.output


def test_a_run_that_fails_does_not_keep_the_others_from_running(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        """
suite: ruler
length: 200
samples: 1
tasks: [vt]
runs:
  # Its context has to end with a delimiter, which this one does not.
  - {press: FinchPress, ratio: 0.5}
  - cache: pikv
"""
    )
    arguments = ["eval", "run", str(file), "--output", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "PiKVCache on ruler 200" in result.output
    failure = "failed Finch 50%: "
    assert result.output.count(failure) == 2, "as it happens, and at the end"
    assert "1 of 2 runs failed" in result.output
    [summary] = (tmp_path / "out").glob("*/summary.json")
    assert "no_press" in summary.parent.name


def test_a_single_run_that_fails_raises(tmp_path):
    with pytest.raises(Exception, match="delimiter"):
        evaluate_cache(cache="dynamic", press="FinchPress", ratio=0.5, tasks=["vt"], **SMALL)


def test_user_errors_are_one_line_and_status_2():
    result = CliRunner().invoke(app, ["eval", "ruler", "--press", "SnapKVPres", "--ratio", "0.5"])
    assert result.exit_code == 2
    assert "did you mean 'SnapKVPress'" in result.output


def test_intervals_hold_what_they_promise():
    import numpy as np

    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        groups = [rng.binomial(1, p, size=40) for p in (0.3, 0.8)]
        bounds = interval(groups, seed=trial)
        hits += bounds["low"] <= 0.55 <= bounds["high"]
    # 95% of 200 within four standard deviations; the percentile method falls a little short at this size.
    assert 174 <= hits <= 200
    assert interval([[0.5]]) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert interval([[1.0, 1.0], [0.0]]) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_needles_in_rulers_words_are_where_the_grid_says(reference_model):
    _, tokenizer = reference_model
    grid = needle.Grid((600,), (0.0, 0.25, 1.0), 2, 7)
    for sample in needle.samples(grid, tokenizer):
        body = sample.context.split("\n")[1]
        start, needle_length = body.index("One of the special magic numbers"), len("One of the special magic numbers")
        share = start / (len(body) - needle_length)
        # A sentence is at most a tenth of such a short text.
        assert share == pytest.approx(sample.extra["depth"], abs=0.12)
        assert len(tokenizer(f"{sample.context}{sample.question}\n{sample.answer_prefix}").input_ids) + 128 <= 600
