"""The benchmarks measure what they say: both sides compute the same, and the JSON says where it came from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_hf.eval.bench.decode import Timing, run_decode, run_prefill, run_reorder
from pikv_hf.eval.bench.generation import run_chunks, run_generation
from pikv_hf.eval.bench.latent_decode import has_indexers, run_latent_decode
from pikv_hf.eval.bench.press_prefill import PRESSES, run_presses
from pikv_hf.eval.cli.main import app

pytestmark = pytest.mark.slow


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


def test_steps_of_latent_attention_agree() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32}
    cases = list(run_latent_decode([600, 3000], seconds=0.0, **small))
    assert [(case.tokens, case.name) for case in cases] == [
        (tokens, f"mla {name}") for tokens in (600, 3000) for name in ("exact", "int8", "int4", "page_bound")
    ]
    for exact, int8, int4, routed in (cases[:4], cases[4:]):
        assert exact.max_difference < 1e-5 < int8.max_difference < int4.max_difference
        assert exact.tokens < 1000 or exact.kv_bytes > int8.kv_bytes > int4.kv_bytes
        assert routed.kv_bytes >= exact.kv_bytes
        assert (exact.to_none, routed.routing, int4.codec) == (1.0, "page_bound:0.25", "int4/int8")
        assert exact.ratio == pytest.approx(exact.dynamic.p50 / exact.pikv.p50)


@pytest.mark.parametrize("wrong", [["--case", "int5"], ["--dtype", "float8"]])
def test_unknown_cases_of_latent_attention_are_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "mla", *wrong])
    assert result.exit_code == 2
    assert wrong[1] in result.output


@pytest.mark.skipif(has_indexers(), reason="this transformers has DeepSeek-V3.2")
def test_indexers_need_a_newer_release() -> None:
    result = CliRunner().invoke(app, ["bench", "mla", "--indexer"])
    assert result.exit_code == 2
    assert "5.24" in result.output


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


def test_a_long_generation_under_a_budget_stays_as_it_is() -> None:
    dynamic, budget = run_generation(tokens=1056, prompt=200, budget=300, schedulers=["streaming_llm"])
    # Keys and values of 4 heads in one layer, 128 channels in fp32; the last token generated is not stored.
    token = 2 * 4 * 128 * 4
    assert dynamic.final_bytes == dynamic.most_bytes == (200 + 1055) * token
    # The pools stay as they are; tables have the numbers of a few pages more or less.
    assert abs(budget.most_bytes - budget.early_bytes) <= 8 * 8
    # A partly filled page in each of eight shards weighs much in so small a budget.
    assert 300 * token * 0.9 < budget.final_bytes < (300 + 8 * 32 + 2 * 32) * token
    for each in (dynamic, budget):
        assert each.growth == pytest.approx(each.late / each.early)
    with pytest.raises(ValueError, match="got 1000"):
        next(run_generation(tokens=1000))


def test_a_prompt_in_chunks_under_a_budget() -> None:
    (few,) = run_chunks(tokens=4096, chunk=256, budget=0.25, schedulers=["h2o"], layers=1)
    assert few.full_bytes == 4096 * 2 * 4 * 128 * 4
    assert 0.25 * few.full_bytes < few.final_bytes <= few.peak_bytes
    assert few.peak_share == few.peak_bytes / few.full_bytes < 0.5


@pytest.mark.parametrize("command", ["generate", "chunks"])
def test_unknown_scheduler_is_refused(command: str) -> None:
    result = CliRunner().invoke(app, ["bench", command, "--scheduler", "h20"])
    assert result.exit_code == 2
    assert "did you mean 'h2o'" in result.output


def test_the_command_for_chunks_writes_them(tmp_path: Path) -> None:
    output = tmp_path / "chunks.json"
    arguments = ["bench", "chunks", "--tokens", "512", "--chunk", "128", "--budget", "0.5", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["results"][0]["cache"] == "pikv, 50%"


def test_routed_steps_say_how_they_were_routed() -> None:
    (case,) = run_decode([3000], [1], seconds=0.0, routing="page_bound", max_pages=4)
    assert case.routing == "page_bound:4"
    # Random keys: pages that are not read are missed, and that is all that the difference says.
    assert case.max_difference > 1e-5
