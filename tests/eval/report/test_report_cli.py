"""``pikv report`` from the command line."""

import shutil

import pytest
from report_folders import write_run, write_suite
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app

pytestmark = pytest.mark.slow


def report(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("command", [[], ["page"]])
def test_folders_become_a_page_whether_or_not_the_command_is_named(tmp_path, command):
    write_suite(tmp_path / "results")
    code, output = report(*command, tmp_path / "results", "--output", tmp_path / "out")
    assert code == 0, output
    assert "and 1 figure beside it" in output
    assert {"report.html", "table.md", "ratios.md"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_an_unfinished_folder_is_named_on_one_line(tmp_path):
    write_suite(tmp_path / "results")
    shutil.copytree(tmp_path / "results" / "a", tmp_path / "results" / "z")
    (tmp_path / "results" / "z" / "summary.json").unlink()
    code, output = report(tmp_path / "results", "--output", tmp_path / "out")
    assert code == 0
    [line] = [line for line in output.splitlines() if line.startswith("Warning: ")]
    assert "did not finish" in line


def test_two_runs_are_compared(tmp_path):
    write_suite(tmp_path / "all")
    code, output = report("compare", tmp_path / "all" / "f", tmp_path / "all" / "b")
    assert code == 0, output
    assert "A: DynamicCache" in output
    assert "-20.00" in output


@pytest.mark.parametrize("arguments", [["nowhere"], ["compare", "nowhere", "nowhere"]])
def test_missing_folders_are_one_line_and_status_2(tmp_path, arguments):
    code, output = report(*arguments)
    assert code == 2
    assert output.startswith("Error: cannot ")
    assert "nowhere" in output


def test_a_folder_of_several_runs_cannot_be_compared(tmp_path):
    write_suite(tmp_path / "all")
    write_run(tmp_path / "one", "DynamicCache")
    assert report("compare", tmp_path / "one", tmp_path / "all") == (
        2,
        f"Error: {tmp_path / 'all'} holds 6 runs, expected one\n",
    )
