"""The benchmarks measure what they say: both sides compute the same, and the JSON says where it came from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_hf.eval.bench import Timing, run_decode, run_prefill, run_reorder
from pikv_hf.eval.cli import app


def test_decode_steps_agree() -> None:
    cases = list(run_decode([40, 500], [1, 3], seconds=0.0))
    assert [(case.tokens, case.batch) for case in cases] == [(40, 1), (40, 3), (500, 1), (500, 3)]
    for case in cases:
        assert case.max_difference < 1e-5
        assert case.pikv.count >= 64 + 5
        assert case.ratio == pytest.approx(case.dynamic.p50 / case.pikv.p50)


def test_codecs_are_timed_against_none_in_the_same_run() -> None:
    cases = list(run_decode([700], [1], seconds=0.0, codecs=("none", "int8", "int2")))
    assert [case.codec for case in cases] == ["none", "int8", "int2"]
    assert cases[0].to_none == 1.0
    assert cases[1].to_none > 0
    assert cases[0].max_difference < 1e-5 < cases[1].max_difference < cases[2].max_difference
    assert cases[0].kv_bytes > cases[1].kv_bytes > cases[2].kv_bytes


def test_reorder_and_prefill_agree() -> None:
    for case in [*run_reorder(beams=4, tokens=200, repeats=2), *run_prefill(tokens=100, repeats=1)]:
        assert case.max_difference < 1e-5


def test_percentiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.p20, timing.p50, timing.p80, timing.mean, timing.count) == (2.0, 3.0, 5.0, 3.0, 5)


def test_command_writes_provenance(tmp_path: Path) -> None:
    output = tmp_path / "results" / "decode.json"
    arguments = ["bench", "decode", "--tokens", "50", "--batch", "1", "--threads", "1", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "PiKVCache" in result.output
    written = json.loads(output.read_text())
    assert written["results"][0]["tokens"] == 50
    assert written["machine"]["threads"] == 1
    assert written["versions"]["torch"].startswith("2.")


def test_unknown_codec_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--codec", "int5"])
    assert result.exit_code == 2
    assert "int5" in result.output


def test_unknown_device_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--device", "tpu"])
    assert result.exit_code == 2
