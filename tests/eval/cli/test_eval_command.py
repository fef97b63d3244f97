"""What `pikv eval` makes of its options before anything is measured."""

from typing import Any

import pytest
from typer.testing import CliRunner

from pikv_hf.eval.cli import eval_command
from pikv_hf.eval.cli.main import app


@pytest.mark.parametrize(
    ("given", "variable", "threads"),
    [
        ((), None, 1),
        (("--threads", "3"), None, 3),
        ((), "2", None),
        (("--model", "some/model"), None, None),
    ],
)
def test_the_bundled_model_runs_on_one_thread(
    given: tuple[str, ...], variable: str | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(eval_command, "_evaluate", lambda options, *others: seen.extend(options))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    result = CliRunner().invoke(app, ["eval", "ruler", *given])
    assert result.exit_code == 0, result.output
    assert [options.threads for options in seen] == [threads]
