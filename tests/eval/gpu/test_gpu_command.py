"""The GPU check as a whole: its report, its exit status, and a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_gpu_check import ROOT, TINY, TINY_LATENTS, TORCH, forever, once, plan_of, tiny_case

from pikv_hf.eval.gpu import (
    command,
    session,
)
from pikv_hf.eval.gpu import (
    run_report as report,
)
from pikv_hf.eval.gpu.check_attention import attention_plan
from pikv_hf.eval.gpu.checks import PlannedCheck
from pikv_hf.eval.gpu.geometry import Shape
from pikv_hf.eval.gpu.latent_speed import LatentCase
from pikv_hf.eval.gpu.page_speed import Sizes
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.kernels.page_codes import Kind

pytestmark = pytest.mark.slow

# The whole.


def run_tiny(
    folder: Path, plans: list[PlannedCheck], time_limit: TimeLimit | None = None, **changes: Any
) -> tuple[bool, dict[str, Any]]:
    cases = [(Shape(TINY, tokens, batch), kind) for tokens, batch in ((64, 2), (32768, 8)) for kind in ("none", "int4")]
    latents = [LatentCase(*TINY_LATENTS, 64, 2, "int4")]
    lists: list[tuple[Shape, tuple[Kind, ...]]] = [(Shape(TINY, 128, 2), ("none", "int4"))]
    agenda = session.Agenda(plans, cases, Sizes(1, 64, 1, 128), sweep=False, latents=latents, lists=lists)
    writer = report.Report(folder, {"name": "NVIDIA Test (1)"})
    run = session.Session(writer, TORCH, time_limit or forever())
    wrong = run.run(agenda, lambda: 1 << 26, lambda: once)
    return wrong, json.loads(writer.path.read_text())


@pytest.mark.usefixtures("single_precision")
def test_a_run_writes_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, found = run_tiny(tmp_path / "new", [attention_plan("ragged rows", tiny_case()), plan_of([1.0])])
    assert not wrong
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["gpu-check-nvidia-test-1.json"]
    assert found["complete"] is True
    assert {"command", "date", "commit", "versions", "gpu", "definitions", "seconds"} <= found.keys()
    assert found["correctness"]["passed"] == 3
    assert {"operation", "name", "dtype", "kind", "max_error", "bound", "ok"} <= found["correctness"]["checks"][
        0
    ].keys()
    # Cases with a target are measured first, whatever their place in the agenda.
    assert [(row["tokens"], row["kind"]) for row in found["attention"]] == [
        (32768, "none"),
        (32768, "int4"),
        (64, "none"),
        (64, "int4"),
    ]
    assert all(row["gb_per_s"] > 0 and row["sdpa_ratio"] > 0 for row in found["attention"])
    [latents] = found["latent_attention"]
    assert (latents["kind"], latents["note"]) == ("int4/none", "")
    assert latents["matmul_ratio"] > 0
    assert latents["sdpa_ratio"] > 0
    [step] = found["steps"]
    assert (step["kind"], step["note"]) == ("none/int4", "")
    assert step["sdpa_ratio"] > 0
    assert step["dynamic_ratio"] > 0
    assert [row["operation"] for row in found["other_kernels"]] == ["encode_pages"] * 8 + ["gather_pages"] * 5 + [
        "page_scores",
        "append_tokens",
        "merge_partials",
    ]
    assert all(row["note"] == "" and row["bytes_moved"] > 0 for row in found["other_kernels"])
    assert found["copy_bandwidth"]["gb_per_s"] > 0
    assert [target["met"] is None for target in found["targets"]] == [False, True, False, False]
    assert found["not_run"] == []
    out = capsys.readouterr().out
    assert "ok  paged_decode_attention  float32" in out
    assert "8 x 32768" in out


@pytest.mark.usefixtures("single_precision")
def test_a_red_check_fails_the_run_and_silences_its_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, found = run_tiny(tmp_path, [plan_of([2.0], "paged_decode_attention", "int4"), plan_of([1.0])])
    assert wrong
    assert (found["correctness"]["failed"], found["correctness"]["passed"]) == (1, 1)
    silent = [row for row in found["attention"] if row["kind"] == "int4"]
    assert all(row["p50_ms"] is row["gb_per_s"] is None and "is red" in row["note"] for row in silent)
    assert all(row["gb_per_s"] > 0 for row in found["attention"] if row["kind"] == "none")
    assert "RED      int4, case: out: error 1, bound" in capsys.readouterr().out


@pytest.mark.usefixtures("single_precision")
def test_a_run_without_time_names_everything(tmp_path: Path) -> None:
    wrong, found = run_tiny(tmp_path, [plan_of([1.0])], TimeLimit(0.0))
    # Checks that were not made are no green ones.
    assert wrong
    assert found["correctness"]["not_run"] == ["gather_pages, case, bfloat16, int8"]
    assert len(found["not_run"]) == 4 + 1 + 1 + 16
    assert all(target["met"] is None for target in found["targets"])


def test_an_unusable_device_leaves_the_checks(tmp_path: Path) -> None:
    def illegal() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    writer = report.Report(tmp_path, {"name": "x"})
    agenda = session.Agenda([plan_of([1.0])], [], Sizes(), sweep=False)
    assert session.Session(writer, TORCH, forever()).run(agenda, illegal, lambda: once)
    found = json.loads(writer.path.read_text())
    assert found["correctness"]["passed"] == 1
    assert found["complete"] is False
    assert "illegal memory access" in found["measurements"]


# The command.

WITHOUT = (
    "typer",
    "rich",
    "kvpress",
    "transformers",
    "accelerate",
    "datasets",
    "pandas",
    "matplotlib",
    "scipy",
    "yaml",
)
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({WITHOUT!r}))
import pikv_hf.eval.gpu as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"pikv_hf.eval.gpu.{{module.name}}")
sys.exit(sys.modules["pikv_hf.eval.gpu.command"].main(["--quick"]))
"""


def run_without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("how", [("-m", "pikv_hf.eval.gpu", "--output", "/nonexistent"), ("-c", IMPORT_ALL)])
def test_without_a_gpu_one_line_says_so(how: tuple[str, ...]) -> None:
    """Run from the checkout, the second time with torch, Triton and NumPy alone."""
    result = run_without_gpu(sys.executable, "-P", *how)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("gpu-check: an NVIDIA GPU is needed")
    assert result.stderr.count("\n") == 1


def test_make_needs_no_environment() -> None:
    result = run_without_gpu("make", "-n", "gpu-check", "VENV=nowhere", "FLAGS=--sweep")
    assert result.returncode == 0, result.stderr
    assert "PYTHONPATH=src python3 -P -m pikv_hf.eval.gpu" in result.stdout
    assert "--output eval/results/gpu/ --sweep" in " ".join(result.stdout.split())
    assert "pip" not in result.stdout


@pytest.mark.parametrize(("failed", "status"), [(False, 0), (True, 1)])
def test_exit_status(failed: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Path, float, bool, bool]] = []

    def run(folder: Path, time_limit: TimeLimit, *, quick: bool, sweep: bool) -> bool:
        called.append((folder, time_limit.seconds, quick, sweep))
        return failed

    monkeypatch.setattr(command, "missing", lambda: "")
    monkeypatch.setattr(session, "run", run)
    assert command.main(["--output", str(tmp_path), "--budget-seconds", "9", "--sweep"]) == status
    assert called == [(tmp_path, 9.0, False, True)]
