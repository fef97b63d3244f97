"""Files saved by earlier releases load, hold what they held, and go on with the same tokens. See tests/golden."""

import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import SUPPORT, environment
from golden_caches import GOLDEN, KINDS, Outcome, load, model_of, outcome, version_of

from pikv_hf.serialization.format import VERSION

IN_ONE_PART = [
    *("plain", "padded", "int4", "lowrank", "budget", "tiers", "routing", "code_bounds", "sliding", "assigned"),
    "lanes",
]
IN_PARTS = ["parts", "processes"]
#: What is committed, by version. A cache in one part was of version 1, in several of version 2.
FILES = {
    "1": IN_ONE_PART,
    "2": IN_PARTS,
    "3": [*IN_ONE_PART, *IN_PARTS],
    "4": [kind for kind in KINDS if kind != "joint"],
}
FILES["5"] = list(KINDS)


def test_all_files_are_there() -> None:
    for version, kinds in FILES.items():
        caches = {path for path in (GOLDEN / version).glob("*.safetensors*") if ".dense." not in path.name}
        assert {path.name.split(".")[0] for path in caches} == set(kinds)
        assert {version_of(path) for path in caches} == {version}
    assert set(FILES[VERSION]) == set(KINDS)


@pytest.mark.parametrize(
    ("version", "kind"), [(version, kind) for version, kinds in FILES.items() for kind in kinds if kind != "processes"]
)
def test_a_saved_cache_is_what_it_was(version: str, kind: str) -> None:
    expected, model = Outcome.read(GOLDEN / version, kind), model_of(kind)
    outcome(model, load(model, GOLDEN / version, kind), expected.chunk).assert_like(expected, kind)


@pytest.mark.slow
@pytest.mark.parametrize("version", [version for version, kinds in FILES.items() if "processes" in kinds])
def test_a_cache_that_processes_saved_is_what_it_was(version: str, tmp_path: Path) -> None:
    script = SUPPORT / "golden_processes.py"
    command = [sys.executable, "-P", script, "load", GOLDEN / version, tmp_path]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    expected = Outcome.read(GOLDEN / version, "processes")
    for rank in ("0", "1"):
        Outcome.read(tmp_path / rank, "processes").assert_like(expected, "processes")
