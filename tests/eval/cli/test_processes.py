"""`pikv` as a process: Ctrl-C, closed pipes, full and missing outputs, narrow and ASCII terminals, no network."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS

PIKV = [sys.executable, "-P", "-m", "pikv_hf.eval.cli.console"]
PLAN = [*PIKV, "plan", "--model", str(MODEL_CONFIGS / "OLMoE-1B-7B-0924.json"), "--context", "2048"]
EVAL = [*PIKV, "eval", "ruler", "--length", "512", "--samples", "400", "--task", "niah_single_1", "--threads", "1"]

pytestmark = pytest.mark.slow


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    for command in (PLAN, [*PIKV, "eval", "ruler", "--help"]):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1


@pytest.mark.parametrize("more", [[], ["--help"]], ids=["table", "help"])
def test_a_full_disk_behind_the_output_is_one_line(more: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([*PLAN, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: No space left on device")
    assert result.stderr.count("\n") == 1


def test_ascii_terminals_get_ascii() -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    result = subprocess.run([*PLAN, "--codec", "ü€"], env=ascii_only, capture_output=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(b"Error: ")
    result = subprocess.run(PLAN, env=ascii_only, capture_output=True, check=True)
    assert b"Memory of the fullest device" in result.stdout
    assert result.stdout.isascii()


def test_no_figure_is_cut_off_in_a_narrow_terminal() -> None:
    parent, child = pty.openpty()
    narrow = os.environ | {"COLUMNS": "40", "TERM": "xterm"}
    process = subprocess.Popen(PLAN, env=narrow, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    while process.poll() is None or shown.count(b"\n") < 5:
        try:
            shown += os.read(parent, 1 << 16)
        except OSError:
            break
    os.close(parent)
    assert process.wait() == 0
    text = shown.decode()
    wide = json.loads(subprocess.run([*PLAN, "--json"], capture_output=True, text=True, check=True).stdout)
    assert f"longest context: {wide['rows'][0]['max_context']:,}" in text
    assert "…" not in text


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded() -> None:
    # Not even root may make a file there.
    result = subprocess.run([*EVAL, "--quiet"], cwd="/proc", capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: cannot write to --output")
    assert result.stderr.count("\n") == 1


def test_a_hub_that_cannot_be_reached_costs_seconds() -> None:
    # Nobody listens at port 9; left alone, the Hub's client tries six times, in half a minute.
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command, nobody = [*PIKV, "plan", "--model", "nobody/nothing"], {"HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(command, env=online | nobody, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Retrying" not in result.stderr


#: As `PIKV`, but says when the command begins.
READY = [sys.executable, "-P", "-c", "from pikv_hf.eval.cli import console; print('ready', flush=True); console.main()"]


@pytest.mark.parametrize("moment", ["imports", "work"])
def test_ctrl_c_is_one_line_and_what_was_measured_is_kept(tmp_path: Path, moment: str) -> None:
    command = [*READY, *EVAL[len(PIKV) :], "--quiet", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 120
    while moment == "work" and not list(tmp_path.glob("*/partial-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), errors
    assert errors.startswith("Interrupted")
    assert errors.count("\n") == 1, errors
    assert (" samples are kept in " in errors) == (moment == "work")
    assert not list(tmp_path.rglob("*.csv"))
