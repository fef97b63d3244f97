"""``pikv plan`` from the command line: text, JSON, local configs, messages."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app
from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS, parse_budget, parse_routing
from pikv_hf.planning.capacity import measured_loads
from pikv_hf.planning.simulate.routing_trace import RoutingTrace, save_trace

pytestmark = pytest.mark.slow

QWEN = ("--model", "Qwen/Qwen3-30B-A3B", "--context", "131072", "--batch", "8", "--devices", "8xH200")


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


def test_the_plan_is_tables_and_one_recommendation():
    text = run(*QWEN)
    assert max(map(len, text.splitlines())) <= 80
    assert "Qwen/Qwen3-30B-A3B: context 131,072, batch 8, up to 8 x H200" in text
    words = " ".join(text.split())
    assert "30.5B parameters, 3.0B of them per token, 56.9 GiB; 48 layers" in words
    assert words.count("Shard over 2 H200, a process each: no codec, no routing") == 1
    assert "sharding over 2 saves time from" in words
    assert "S = 16,748 (z = 3)" in words
    for name in ("1", "2 processes", "4 processes", "8 processes"):
        assert f"\n {name} " in text


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("100", 100), ("200", 100)])
def test_the_plan_is_as_wide_as_columns_say(columns, most, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = run(*QWEN).splitlines()
    assert most - 10 < max(map(len, lines)) <= most
    assert ("  longest context: 78,528" in lines) == (columns == "60")


def test_json_has_the_same_figures():
    found = json.loads(run(*QWEN, "--json"))
    assert found["model"]["params"] == 30_532_122_624
    assert [row["devices"] for row in found["rows"]] == [1, 2, 4, 8]
    assert [row["fits"] for row in found["rows"]] == [False, True, True, True]
    assert found["recommended"]["devices"] == 2
    assert found["recommended"]["key_codec"] == "none"
    assert found["saves_time_from_tokens"].keys() == {"2", "4", "8"}
    for row in found["rows"]:
        parts = (row["step"][name] for name in ("weights", "attention", "exchange", "overhead"))
        assert row["step_seconds"] == pytest.approx(sum(parts))
        assert row["tokens_per_second"] == pytest.approx(8 / row["step_seconds"])
        assert row["needed_bytes"] == pytest.approx(row["weight_bytes"] + row["kv_bytes"], abs=1)
    assert found["capacity"]["tokens"] == 16_748
    assert 0 < found["capacity"]["overflow"] < found["capacity"]["any_overflow"] < 0.01
    assert found["bytes_per_token_and_layer"]["plain"] == 2 * 4 * 128 * 2


def test_options_are_taken_as_given():
    given = "--codec", "int4", "--value-codec", "int2", "--routing", "page_bound:32", "--budget", "0.5"
    found = json.loads(run(*QWEN, *given, "--mode", "devices", "--page-size", "64", "--json"))
    options = found["options"]
    assert (options["key_codec"], options["value_codec"]) == ("int4", "int2")
    assert (options["routing"], options["max_pages"]) == ("page_bound", 32)
    assert (options["budget"], options["page_size"]) == (0.5, 64)
    assert {row["mode"] for row in found["rows"]} == {"devices"}
    assert found["recommended"]["key_codec"] == "int4"


def test_a_local_config_needs_no_name(tmp_path):
    shutil.copy(MODEL_CONFIGS / "OLMoE-1B-7B-0924.json", tmp_path / "config.json")
    for where in (tmp_path, tmp_path / "config.json"):
        found = json.loads(run("--model", str(where), "--context", "4096", "--devices", "H100", "--json"))
        assert found["model"]["params"] == 6_919_161_856
        assert found["model"]["name"] == str(where)


def test_a_trace_gives_the_loads_of_the_most_uneven_layer(tmp_path):
    even, skewed = np.arange(1280) % 128, np.minimum(np.arange(1280) % 128, 20)
    trace = RoutingTrace(np.stack([even, skewed]).astype(np.int16), 128, (0, 1), "test")
    path = save_trace(trace, tmp_path / "trace.npz")
    found = json.loads(run(*QWEN, "--trace", str(path), "--json"))
    expected = max(measured_loads(np.bincount(skewed, minlength=128).tolist(), 8))
    assert found["capacity"]["load"] == pytest.approx(expected)
    assert expected > 0.8


def test_routing_and_budget_are_read():
    assert parse_routing("all") == {"routing": "all"}
    assert parse_routing("page_bound:64") == {"routing": "page_bound", "max_pages": 64}
    assert parse_routing("adaptive:0.1") == {"routing": "adaptive", "max_pages": 0.1}
    assert [parse_budget(text) for text in ("4096", "0.25", "2GiB")] == [4096, 0.25, "2GiB"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "8xH20"), "unknown device 'H20', did you mean 'H200'?"),
        (("--codec", "in4"), "got 'in4', did you mean 'int4'?"),
        (("--context", "0"), "tokens must be at least 1, got 0"),
        (("--routing", "page_bond:3"), "got 'page_bond', did you mean 'page_bound'?"),
        (("--routing", "page_bound:x"), "max_pages must be a number, got 'x'"),
        (("--budget", "10"), "leaves 10 tokens, but at least 224 are needed"),
        (("--budget", "2Gibi"), "got '2Gibi'"),
        (("--mode", "both"), "mode must be 'processes' or 'devices', got 'both'"),
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--model", "Qwen3"), "no config for model 'Qwen3'"),
        (("--calibrate",), "--calibrate measures a CPU, but --devices is H200"),
        (("--trace", "missing.npz"), "missing.npz"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_both_values(arguments, message):
    error = run(*QWEN, *arguments, status=2)
    assert message in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
