"""The benchmarks measure what they say: both sides compute the same, and the JSON says where it came from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_hf.eval.bench import Timing, run_decode, run_prefill, run_reorder
from pikv_hf.eval.bench_press import PRESSES, run_presses
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


def test_presses_are_timed_against_none_and_dynamic_cache_in_the_same_run() -> None:
    timings = list(run_presses(tokens=300, ratio=0.75, repeats=1))
    assert [timing.press for timing in timings] == ["none", *PRESSES]
    none, *pressed = timings
    assert (none.to_none, none.ratio) == (1.0, 0.0)
    # Keys and values of 4 heads in 2 layers, 128 channels in fp32.
    whole = 300 * 2 * 4 * 2 * 128 * 4
    assert none.kv_bytes >= whole
    sizes = {timing.press: timing.kv_bytes / whole for timing in pressed}
    # So few tokens are mostly in the window, which LoRAPress leaves as it is.
    del sizes["LoRAPress"]
    assert max(sizes.values()) < 0.5, sizes
    for timing in timings:
        assert (timing.pikv.count, timing.tokens) == (1, 300)
        assert timing.to_dynamic > 0
        assert timing.to_none > 0


def test_the_command_for_presses_shows_and_writes_them(tmp_path: Path) -> None:
    output = tmp_path / "press.json"
    arguments = ["bench", "press", "--tokens", "100", "--repeats", "1", "--threads", "1", "--press", "SnapKVPress"]
    result = CliRunner().invoke(app, [*arguments, "--ratio", "0.5", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "to DynamicCache" in result.output
    written = json.loads(output.read_text())
    assert [(row["press"], row["ratio"]) for row in written["results"]] == [("none", 0.0), ("SnapKVPress", 0.5)]
    assert written["machine"]["threads"] == 1


def test_unknown_press_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "press", "--press", "PiKVPres"])
    assert result.exit_code == 2
    assert "did you mean 'PiKVPress'" in result.output


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
