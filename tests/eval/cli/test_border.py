"""How commands end: known kinds of errors on one line with a status, mistakes of the project with their traceback."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from command_lines import run

from pikv_hf.common.extras import MissingExtraError
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import check_output_file, check_output_folder, write_file
from pikv_hf.eval.runner.refusals import refusals

KNOWN = [
    (InputError("--x must be 1, got 2"), 2, "Error: --x must be 1, got 2"),
    (MissingExtraError('pikv plan needs pandas: pip install ".[eval]"'), 2, "Error: pikv plan needs pandas: pip"),
    (KeyboardInterrupt(), 130, "Interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "out/x.json"), 1, "Error: No space left on device: out/x.json"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Error: Permission denied: x"),
    (MemoryError("Unable to allocate 5.94 PiB"), 1, "Error: out of memory: Unable to allocate 5.94 PiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Error: out of memory: DefaultCPUAllocator"),
]
#: None of them says that the user or the machine was wrong.
MISTAKES = [AttributeError("x"), KeyError("x"), IndexError("x"), TypeError("x"), RuntimeError("x"), ValueError("x")]


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Any:
    def let(error: BaseException) -> list[str]:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("pikv_hf.eval.cli.plan_command._workload", fail)
        return ["plan", "--model", "x"]

    return let


@pytest.mark.parametrize(("error", "status", "line"), KNOWN, ids=lambda value: type(value).__name__)
def test_what_is_not_our_mistake_is_one_line(raising: Any, error: BaseException, status: int, line: str) -> None:
    outcome = run(raising(error))
    assert (outcome.status, outcome.errors.count("\n")) == (status, 1)
    assert outcome.errors.startswith(line)


@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: type(error).__name__)
def test_our_mistakes_are_not_hidden(raising: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        run(raising(error))


@pytest.mark.parametrize("error", [each[0] for each in KNOWN], ids=lambda error: type(error).__name__)
def test_every_traceback_can_be_had(raising: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIKV_DEBUG", "1")
    with pytest.raises(type(error)):
        run(raising(error))


def test_what_was_noted_on_the_way_is_on_the_line(raising: Any) -> None:
    error = KeyboardInterrupt()
    error.add_note("3 samples are kept in out")
    assert run(raising(error)).errors == "Interrupted; 3 samples are kept in out\n"


def raised_in(package: str, error: Exception) -> None:
    exec("def fail(error): raise error", scope := {"__name__": f"{package}.presses.some_press"})
    scope["fail"](error.with_traceback(None))


@pytest.mark.parametrize(
    "error", [AttributeError("no attribute 'head_dim'"), AssertionError("too short"), KeyError("x")]
)
def test_an_error_of_the_press_or_model_that_was_chosen_is_a_refusal(error: Exception) -> None:
    for package in ("kvpress", "transformers"):
        with pytest.raises(InputError, match=f"SnapKV on X: {type(error).__name__}: "), refusals("SnapKV on X"):
            raised_in(package, error)
    with pytest.raises(type(error)), refusals("SnapKV on X"):
        raised_in("pikv_hf", error)
    # With a cache of this project, what fails in transformers may be the cache's mistake.
    with pytest.raises(type(error)), refusals("SnapKV on X", chosen=("kvpress",)):
        raised_in("transformers", error)


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "made" / "x.json"
    write_file(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_file(file, "new")
    assert caught.value.filename == str(file)
    assert [each.name for each in file.parent.iterdir()] == ["x.json"]
    assert file.read_text() == "old"


def test_devices_and_links_are_written_to_not_replaced(tmp_path: Path) -> None:
    write_file(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("place", ["a_file/x", "/proc/no/such", "a\x00b", "n" * 300 + "/x"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    for check in (check_output_file, check_output_folder):
        with pytest.raises(InputError, match="--output"):
            check(Path(place), "--output")
    check_output_file(Path("new/x.json"), "--output")
    check_output_folder(Path("new/deep"), "--output")
    assert [each.name for each in Path().iterdir()] == ["a_file"]
