"""The benchmark of loading a saved cache against reading the prompt again."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app

pytestmark = pytest.mark.slow


def test_the_benchmark_compares_with_reading_again(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    arguments = ["bench", "load", "--tokens", "300", "--repeats", "1", "--layers", "1", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--chunk", "200", "--output", str(output)])
    assert result.exit_code == 0, result.output
    cases = json.loads(output.read_text())["results"]
    assert [case["codec"] for case in cases] == ["none", "int4"]
    for case in cases:
        assert (case["tokens"], case["chunk"], case["layers"], case["load"]["count"]) == (300, 200, 1, 1)
        assert case["same_tokens"]
        assert case["max_difference"] == 0
        assert case["ratio"] == pytest.approx(case["prefill"] / case["load"]["p50"])
        assert case["loaded_bytes"] <= case["kv_bytes"]
        # Free pages are not in the file, which has a header instead.
        assert 0.5 * case["kv_bytes"] < case["file_bytes"] < case["kv_bytes"] + 32768


def test_the_benchmark_refuses_unknown_codecs() -> None:
    result = CliRunner().invoke(app, ["bench", "load", "--codec", "int5"])
    assert result.exit_code == 2
    assert "int5" in result.output
