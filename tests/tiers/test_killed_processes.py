"""Processes end, are killed or outlive each other: the others go on, and nothing is left on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import SUPPORT, environment

#: How many processes go on in each scene of `tiers_in_a_process.py`.
SCENES = {
    "SIGTERM": 0,
    "SIGKILL": 0,
    "the child ends first": 2,
    "the parent ends first": 2,
    "the parent is killed": 1,
}


@pytest.mark.slow
def test_whoever_goes_on_is_right_and_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SUPPORT / "tiers_in_a_process.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    said = [line for scene, right in SCENES.items() for line in (scene, *["right"] * right, "left: []")]
    assert done.stdout.splitlines() == said, done.stderr
    assert not done.stderr
