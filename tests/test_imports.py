"""What ``import pikv_hf`` costs, measured in fresh processes, and what each part of the code may import."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pikv_hf.common.extras import EXTRAS

ROOT = Path(__file__).parents[1]

# What transformers imports by itself.
WITH_TRANSFORMERS = {"huggingface_hub", "jinja2", "tokenizers", "yaml"}

# Heavy or optional: whoever needs one imports it when it runs.
NOT_AT_IMPORT = (*sorted(set().union(*EXTRAS.values()) - WITH_TRANSFORMERS), "psutil", "pytest", "triton")

# Loads what any user of transformers' caches loads anyway, then pikv_hf and its cache, and tells the seconds that each
# took of the processor, and the new modules.
MEASURE = """
import json, sys, time

def load(*names):
    before, start = set(sys.modules), time.process_time()
    for name in names:
        __import__(name)
    return time.process_time() - start, sorted({name.split(".")[0] for name in set(sys.modules) - before})

theirs = load("transformers.cache_utils", "transformers.modeling_utils")
# Of 5.24 what says which attention may be attached imports accelerate.
load("transformers.integrations.sdpa_attention", "transformers.masking_utils")
ours = load("pikv_hf", "pikv_hf.cache")
print(json.dumps({"theirs": theirs, "ours": ours}))
"""


def run_python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_import_works_without_optional_packages(tmp_path):
    missing = f"import sys\nsys.modules.update(dict.fromkeys({NOT_AT_IMPORT!r}))\n"
    assert run_python(f"{missing}import pikv_hf; print(pikv_hf.PiKVCache.__name__)", tmp_path).strip() == "PiKVCache"


@pytest.mark.slow
def test_import_adds_at_most_a_fifth_to_that_of_transformers(tmp_path):
    measured = json.loads(run_python(MEASURE, tmp_path))
    (theirs, _), (ours, modules) = measured["theirs"], measured["ours"]
    assert not set(modules) & set(NOT_AT_IMPORT)
    assert ours <= 0.2 * theirs, f"import pikv_hf adds {ours:.3f} s to {theirs:.3f} s"


def imported_packages(folder: Path) -> Iterator[str]:
    """Yield the package of every import statement below a folder, symbolic links not followed."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("kernels", EXTRAS["cpu"]),
        ("src/pikv_hf", ()),
        ("presses", EXTRAS["kvpress"]),
        ("eval", (*EXTRAS["eval"], *EXTRAS["real"])),
    ],
)
def test_every_import_is_of_a_declared_dependency(folder: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bare = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    brought_by = {module: set(map(canonicalize_name, names)) for module, names in packages_distributions().items()}
    others = {name for name in imported_packages(ROOT / folder) if name not in sys.stdlib_module_names} - {"pikv_hf"}
    assert others
    assert {name for name in others if name not in extras and not bare & brought_by.get(name, set())} == set()
