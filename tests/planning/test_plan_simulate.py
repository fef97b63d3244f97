"""``pikv plan --simulate``: tables, files, traces and messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app
from pikv_hf.eval.cli.simulation_view import amount
from pikv_hf.planning.simulate.placements import PLACEMENTS
from pikv_hf.planning.simulate.routing_trace import Popularity, save_trace, synthetic_trace
from pikv_hf.planning.simulate.simulation import COUNTS

EXPERTS, LAYERS = 8, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a config; there are no weights."""
    folder = tmp_path_factory.mktemp("model")
    Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        intermediate_size=16,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


def run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["plan", "--context", "1500", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_table_and_files(model: str, tmp_path: Path) -> None:
    plot, output = tmp_path / "plot.png", tmp_path / "out.json"
    shown = run("--model", model, "--simulate", "--plot", str(plot), "--output", str(output)).stdout
    for name in PLACEMENTS:
        assert sum(line.split()[:1] == [name] for line in shown.splitlines()) == len(COUNTS)
    assert "Zipf 1" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(output.read_text())
    assert len(written["outcomes"]) == len(PLACEMENTS) * len(COUNTS)
    assert {"command", "date", "versions", "claims", "contexts"} <= set(written)


def test_json_of_given_devices(model: str) -> None:
    found = json.loads(run("--model", model, "--simulate", "--devices", "3xH100", "--batch", "2", "--json").stdout)
    assert sorted({outcome["devices"] for outcome in found["outcomes"]}) == [3, *COUNTS]
    assert found["options"]["batch"] == 2
    assert found["device"] == "H100"
    # K and V of 2 heads and 16 dims in bfloat16, 2 layers and rows.
    assert found["total_bytes"] == 1500 * 2 * 2 * 16 * 2 * LAYERS * 2


def test_recorded_trace(model: str, tmp_path: Path) -> None:
    file = save_trace(synthetic_trace(LAYERS, EXPERTS, 400, Popularity(skew=3.0)), tmp_path / "trace.npz")
    skewed = json.loads(run("--model", model, "--simulate", "--trace", str(file), "--json").stdout)
    even = json.loads(run("--model", model, "--simulate", "--skew", "0", "--json").stdout)
    worst = {name: _balance(found) for name, found in (("skewed", skewed), ("even", even))}
    assert worst["skewed"] > 1.3 * worst["even"]


def _balance(found: dict[str, Any]) -> float:
    return max(outcome["layer_balance"] for outcome in found["outcomes"] if outcome["placement"] == "expert")


def test_what_cannot_be_simulated(model: str, tmp_path: Path) -> None:
    trace = save_trace(synthetic_trace(1, 4, 50), tmp_path / "trace.npz")
    simulate = "--model", model, "--simulate"
    for arguments, message in (
        (("--model", model, "--plot", "x.png"), "--plot x.png needs --simulate"),
        (("--model", model, "--skew", "1"), "--skew 1.0 needs --simulate"),
        ((*simulate, "--codec", "int4"), "takes no --codec, --routing or --budget"),
        ((*simulate, "--budget", "0.5"), "takes no --codec, --routing or --budget"),
        ((*simulate, "--skew", "-1"), "skew has to be at least 0"),
        ((*simulate, "--trace", str(trace), "--skew", "1"), "has a skew of its own"),
        ((*simulate, "--trace", str(trace)), "the trace has 4 experts"),
        ((*simulate, "--plot", str(tmp_path / "none" / "x.png")), "no folder"),
    ):
        # Long messages are not broken into lines.
        assert message in run(*arguments, status=2).output


def test_amounts() -> None:
    assert [amount(size) for size in (0, 999, 1500, 2.5e6, 1.03e11, 3e12)] == [
        *("0 B", "999 B", "1.5 kB", "2.5 MB", "103 GB", "3 TB")
    ]
