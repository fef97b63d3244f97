"""`pikv bench steps`: caches take turns at the same tokens, and what is said of their bytes and temporaries is so."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pikv_hf.eval.bench import steps
from pikv_hf.eval.bench.decode import Timing, geometry_model
from pikv_hf.eval.bench.largest_tensor import Largest, NewTensors, largest_of_calls
from pikv_hf.eval.bench.step_caches import Prompt, filled
from pikv_hf.eval.bench.step_table import step_table
from pikv_hf.eval.bench.steps import CASES, Decoding, StepTiming, run_steps, small_model
from pikv_hf.eval.cli.main import app

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"WARM": 1, "LEAST": 2, "WATCHED": 1}.items():
        monkeypatch.setattr(steps, name, few)


def timings_of(case: str, tokens: int, *caches: str) -> dict[str, StepTiming]:
    return {each.cache: each for each in run_steps([case], [tokens], caches, seconds=0.0)}


def test_whole_and_pressed_caches_are_timed_in_turn() -> None:
    done = timings_of("geometry", 600, "dynamic", "exact", "int4", "press:0.25", "kept:0.25")
    dynamic, exact, int4, press, kept = done.values()
    assert exact.max_difference < 1e-5
    # Keys and values of 4 heads in 2 layers, 128 channels in fp32; three steps were taken.
    assert (dynamic.kv_bytes, kept.kv_bytes) == tuple((tokens + 3) * 2 * 4 * 2 * 128 * 4 for tokens in (600, 150))
    assert exact.bytes_to_dynamic > int4.bytes_to_dynamic > press.bytes_to_dynamic
    assert 0.1 < press.bytes_to_dynamic < 0.35
    assert sum(press.widths.values()) == pytest.approx(1.0)
    assert len(press.widths) >= 2
    assert press.to_kept > 0
    assert kept.to_kept is exact.widths is None
    assert {each.timing.count for each in done.values()} == {2}
    assert dynamic.to_dynamic == exact.to_exact == 1.0


def test_ragged_rows_and_beams_agree() -> None:
    assert timings_of("ragged", 70, "dynamic", "exact", "press:0.5", "kept:0.5")["exact"].max_difference < 1e-5
    beams = timings_of("beams", 70, "dynamic", "exact", "press:0.5")
    assert beams["exact"].max_difference < 1e-5
    assert beams["press:0.5"].rows == 4


def test_a_turn_may_be_several_steps() -> None:
    (timing,) = run_steps(["geometry"], [40], ["exact"], seconds=0.0, turn=3)
    assert timing.timing.count == 6


def test_prompts_agree() -> None:
    exact, int4 = (timings_of("prefill", 100, "dynamic", "exact", "int4")[name] for name in ("exact", "int4"))
    assert exact.max_difference < 1e-5
    assert int4.to_dynamic > 0
    assert int4.temporary is None


def test_the_small_model_is_of_the_shape_of_smollm2() -> None:
    with torch.device("meta"):
        assert small_model().num_parameters() == 134_515_008


@pytest.mark.parametrize("cache", ["exact", "int8", "int4", "press:0.25"])
def test_temporaries_of_steps_are_small_beside_a_layer(cache: str) -> None:
    # At 131,072 tokens the keys of a layer are 256 MiB, and no temporary may have more than 64.
    tokens, model = 4096, geometry_model(layers=2)
    prompt = Prompt.drawn(model.config, 1, tokens, ragged=False)
    with torch.no_grad():
        held, _ = filled(cache, model, prompt)
        temporary, _ = largest_of_calls(Decoding(model, held, prompt, 1), range(3))
    assert 0 < temporary.nbytes < prompt.layers[0][0].nbytes // 4, temporary.operation


def test_what_dynamic_cache_copies_is_seen() -> None:
    grown = timings_of("geometry", 1000, "dynamic")["dynamic"].grown
    assert grown.nbytes >= 1000 * 4 * 128 * 4
    assert "cat" in grown.operation


def test_views_and_writes_in_place_are_not_new() -> None:
    held = torch.zeros(64, 64)
    with NewTensors() as new:
        held.view(-1)[:7].add_(1.0)
        held.resize_(32, 64)
        stays = held[:2] * 2
        held[:4] + 1.0
    assert new.largest() == (Largest(4 * 64 * 4, "aten.add.Tensor"), Largest(stays.nbytes, "aten.mul.Tensor"))


def test_the_table_fits_80_columns() -> None:
    timing = StepTiming(
        case="geometry",
        tokens=131072,
        rows=1,
        cache="press:0.0625",
        timing=Timing(0.9999, 1.2345, 1.3456, 1.2, 5),
        to_exact=12.34,
        to_dynamic=12.34,
        to_kept=12.34,
        kv_bytes=1 << 30,
        bytes_to_dynamic=1.0,
        max_difference=1e-6,
        temporary=Largest(1 << 30, "aten.cat.default"),
        grown=None,
        widths=None,
        kernels="torch",
    )
    console = Console(width=80, record=True)
    console.print(step_table([timing, dataclasses.replace(timing, to_kept=None, temporary=None)]))
    shown = console.export_text()
    assert re.search(r"press:0.0625 +1,234 +12.34 +12.34 +12.34", shown)
    assert "1024.0" in shown


def test_the_command_shows_and_writes_steps(tmp_path: Path) -> None:
    output = tmp_path / "steps.json"
    arguments = ["--case", "beams", "--tokens", "50", "--seconds", "0", "--threads", "1", "--output", str(output)]
    result = CliRunner().invoke(app, ["bench", "steps", *arguments])
    assert result.exit_code == 0, result.output
    assert "beams 50" in result.output
    written = json.loads(output.read_text())
    assert [row["cache"] for row in written["results"]] == list(CASES["beams"].caches)
    assert {row["kernels"] for row in written["results"]} <= {"torch", "numba"}
    assert "numba" in written["versions"]
    assert written["results"][0]["grown"]["nbytes"] > 0


@pytest.mark.parametrize(
    "wrong", [["--case", "medium"], ["--cache", "int5"], ["--cache", "press:2"], ["--cache", "kept:0.5"]]
)
def test_what_cannot_be_timed_is_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "steps", *wrong])
    assert result.exit_code == 2
    assert wrong[1] in result.output
