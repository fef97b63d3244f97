"""Odd values for every option of every command, read from the declarations: accepted, or one line and an exit status.

A new command or option is covered by itself. What is accepted stops where its work would begin.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_lines import Command, Reached, commands, odd_arguments, run
from typer.main import get_command

from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS
from pikv_hf.eval.runner.models import REFERENCE, load_model

pytestmark = pytest.mark.slow

COMMANDS = list(commands())
#: Odd values of each option; all of them, `PIKV_ODD_VALUES=29`, take minutes.
EACH = int(os.environ.get("PIKV_ODD_VALUES", "2"))
#: What a command has to be given, and what keeps it short; a path is one of `odd_files`.
GIVEN: dict[str, list[str]] = {
    "eval ruler": ["--length", "512", "--samples", "1", "--task", "niah_single_1", "--quiet"],
    "eval longbench": ["--data-dir", "bundled", "--limit", "1", "--task", "qasper", "--quiet"],
    "eval perplexity": ["--length", "600", "--samples", "1", "--quiet"],
    "eval needle": ["--length", "512", "--depth", "0", "--samples", "1", "--quiet"],
    "eval scbench": ["--data-dir", "bundled", "--task", "scbench_kv", "--limit", "1"],
    "eval run": ["runs.yaml", "--quiet"],
    "report page": ["a_folder"],
    "report budgets": ["a_folder"],
    "report compare": ["a_folder", "a_folder"],
    "plan": ["--model", str(MODEL_CONFIGS / "OLMoE-1B-7B-0924.json"), "--context", "2048"],
    "demo": ["--tokens", "500"],
    "chat": ["--model", "reference"],
    "store ls": ["a_folder"],
    "store stats": ["a_folder"],
    "store verify": ["a_folder"],
    "store prune": ["a_folder", "--to", "1MiB"],
}
#: Where work begins: nothing before it takes long.
WORK = (
    "pikv_hf.eval.bench.context_reuse._lookup",
    "pikv_hf.eval.bench.decode.geometry_model",
    "pikv_hf.eval.bench.generation.geometry_model",
    "pikv_hf.eval.bench.latent_decode.latent_model",
    "pikv_hf.eval.bench.press_prefill.geometry_model",
    "pikv_hf.eval.bench.saved_cache.geometry_model",
    "pikv_hf.eval.bench.steps._all_timings",
    "pikv_hf.eval.bench.processes._run_all",
    "pikv_hf.eval.cli.chat_command._lines",
    "pikv_hf.eval.runner.shared_contexts.ask_all",
    "pikv_hf.eval.demo.demo.measure",
    "pikv_hf.eval.runner.run._measure",
)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the declarations takes longer than most commands.
    monkeypatch.setattr("typer.main.get_command", functools.cache(get_command))

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    for place in WORK:
        monkeypatch.setattr(place, reached)
    known: dict[Any, Any] = {}

    def load_once(name: str = REFERENCE, *options: Any) -> Any:
        if (name, *options) not in known:
            known[name, *options] = load_model(name, *options)
        return known[name, *options]

    monkeypatch.setattr("pikv_hf.eval.runner.api.load_model", load_once)
    monkeypatch.setattr("pikv_hf.eval.demo.task.load_model", load_once)
    monkeypatch.setattr("pikv_hf.eval.runner.models.load_model", load_once)


@pytest.fixture
def odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "json").write_text(json.dumps({"data": "none", "version": 3}))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "runs.yaml").write_text("suite: ruler\nlength: 512\nsamples: 1\ntasks: [niah_single_1]\n")
    return tmp_path


def check(arguments: list[str]) -> None:
    before = sorted(Path().rglob("*"))
    outcome = run(arguments)
    if outcome.status in (None, 0):
        return
    said = [line for line in outcome.errors.splitlines() if not line.startswith("Warning: ")]
    assert outcome.status in (1, 2), (arguments, outcome)
    assert len(said) == 1, (arguments, outcome)
    assert said[0].startswith("Error: "), (arguments, said)
    assert sorted(Path().rglob("*")) == before, f"{arguments} left something behind"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_odd_values_are_accepted_or_refused_on_one_line(command: Command, odd_files: Path, no_work: None) -> None:
    for arguments in odd_arguments(command, EACH):
        check([*command.words, *GIVEN.get(command.name, ()), *arguments])
