"""What ``import pikv_hf`` costs, measured in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_import_works_without_optional_packages(tmp_path):
    missing = f"import sys\nsys.modules.update(dict.fromkeys({NOT_AT_IMPORT!r}))\n"
    assert run_python(f"{missing}import pikv_hf; print(pikv_hf.PiKVCache.__name__)", tmp_path).strip() == "PiKVCache"


def test_import_adds_at_most_a_fifth_to_that_of_transformers(tmp_path):
    # The least of several runs: other load on the machine only ever adds.
    runs = [json.loads(run_python(MEASURE, tmp_path)) for _ in range(3)]
    theirs, ours = (min(run[who][0] for run in runs) for who in ("theirs", "ours"))
    assert not set(runs[0]["ours"][1]) & set(NOT_AT_IMPORT)
    assert ours <= 0.2 * theirs, f"import pikv_hf adds {ours:.3f} s to {theirs:.3f} s"
