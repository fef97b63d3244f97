"""The built distribution holds what the repository does: every package, every data file, importable elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_SOURCE = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "shared")

# What the code reads at run time. Results are for people, and stay in the repository.
DATA = ("reference_model/*", "model_configs/*", "report/*.jinja", "tasks/*/data/*")

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import pikv_hf
names = [module.name for module in pkgutil.walk_packages(pikv_hf.__path__, "pikv_hf.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({name: module.__file__ for name, module in sys.modules.items() if name.startswith("pikv_hf")}))
"""


def folders_with_modules() -> dict[str, Path]:
    """Return package name and folder of everything below src/pikv_hf, symbolic links followed."""
    top = ROOT / "src" / "pikv_hf"
    found = {}
    for folder, _, files in os.walk(top, followlinks=True):
        if any(file.endswith(".py") for file in files):
            found[".".join(["pikv_hf", *Path(folder).relative_to(top).parts])] = Path(folder)
    return found


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a source distribution of a clean copy: left-over metadata in the tree would hide omissions."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    # Without --sdist or --wheel, build makes the wheel from the unpacked source distribution.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return next(out.glob("*.whl"))


def test_every_folder_with_modules_is_a_listed_package():
    folders = folders_with_modules()
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert all((folder / "__init__.py").exists() for folder in folders.values())


def test_packages_are_built_from_the_folders_that_editors_see():
    built = {name: (ROOT / SETUPTOOLS["package-dir"][name]).resolve() for name in SETUPTOOLS["packages"]}
    assert built == {name: folder.resolve() for name, folder in folders_with_modules().items()}


def test_wheel_holds_every_module_and_data_file(wheel):
    expected = {"pikv_hf/py.typed"}
    for name, folder in folders_with_modules().items():
        expected |= {f"{name.replace('.', '/')}/{file.name}" for file in folder.glob("*.py")}
    data = {file for pattern in DATA for file in (ROOT / "eval").glob(pattern)}
    assert {"model.safetensors", "report.html.jinja", "squad.json", "narrativeqa.jsonl"} <= {f.name for f in data}
    expected |= {f"pikv_hf/{file.relative_to(ROOT)}" for file in data}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_every_module_of_the_wheel_imports_elsewhere(wheel, tmp_path):
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    loaded = json.loads(run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=str(target)))
    assert set(SETUPTOOLS["packages"]) <= set(loaded)
    # An editable install of the repository must not stand in for what the wheel lacks.
    assert {name for name, file in loaded.items() if not Path(file).is_relative_to(target)} == set()
