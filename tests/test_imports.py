"""What ``import pikv_hf`` costs, measured in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Heavy or optional: whoever needs one imports it when it runs.
NOT_AT_IMPORT = ("kvpress", "datasets", "evaluate", "triton", "matplotlib", "pandas", "typer", "pytest")

# Loads what any user of transformers' caches loads anyway, then pikv_hf, and tells the seconds and new modules of each.
MEASURE = """
import json, sys, time

def load(*names):
    before, start = set(sys.modules), time.perf_counter()
    for name in names:
        __import__(name)
    return time.perf_counter() - start, sorted({name.split(".")[0] for name in set(sys.modules) - before})

theirs = load("transformers.cache_utils", "transformers.modeling_utils")
ours = load("pikv_hf")
print(json.dumps({"theirs": theirs, "ours": ours}))
"""


def run_python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return [json.loads(run_python(MEASURE, tmp_path_factory.mktemp("elsewhere"))) for _ in range(3)]


def test_import_loads_nothing_heavy(runs):
    _, modules = runs[0]["ours"]
    assert "pikv_hf" in modules
    assert not set(modules) & set(NOT_AT_IMPORT)


def test_import_works_without_optional_packages(tmp_path):
    # transformers loads some of them by itself where they are installed, so that the test above cannot see them.
    missing = f"import sys\nsys.modules.update(dict.fromkeys({NOT_AT_IMPORT!r}))\n"
    assert run_python(f"{missing}import pikv_hf; print(pikv_hf.PiKVCache.__name__)", tmp_path).strip() == "PiKVCache"


def test_import_adds_at_most_a_fifth_to_that_of_transformers(runs):
    # The least of several runs: other load on the machine only ever adds.
    theirs, ours = (min(run[who][0] for run in runs) for who in ("theirs", "ours"))
    assert ours <= 0.2 * theirs, f"import pikv_hf adds {ours:.3f} s to {theirs:.3f} s"
