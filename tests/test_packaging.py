"""The built distribution holds what the repository does, imports elsewhere, and works with a bare install."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pikv_hf.common.extras import EXTRAS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SOURCE = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "shared")

# Run from a checkout.
NOT_IN_WHEEL = ("pikv_hf.eval.studies", "pikv_hf.eval.training")

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

GENERATE = """
import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
from pikv_hf import PiKVCache

sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
torch.manual_seed(0)
model = MixtralForCausalLM(MixtralConfig(vocab_size=128, num_hidden_layers=2, num_local_experts=4, **sizes)).eval()
prompt = torch.randint(128, (2, 100))

def continued(cache):
    return model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)

expected = continued(DynamicCache(config=model.config))
cache = PiKVCache.for_model(model, page_size=8, recent_window=16)
assert torch.equal(continued(cache), expected)
print(cache.memory_report())
"""

IMPORT_CORE = """
import importlib, importlib.util, pkgutil
import pikv_hf
for optional in ("kvpress", "datasets", "evaluate", "matplotlib", "numba", "optimum", "pandas", "scipy", "wonderwords"):
    assert importlib.util.find_spec(optional) is None, optional
for module in pkgutil.walk_packages(pikv_hf.__path__, "pikv_hf."):
    if not module.name.startswith(("pikv_hf.eval", "pikv_hf.presses", "pikv_hf.kernels.numba_")):
        importlib.import_module(module.name)
"""


def shipped_folders() -> dict[str, Path]:
    """Return package name and folder of all that has modules below src/pikv_hf, symbolic links followed."""
    top = ROOT / "src" / "pikv_hf"
    found = {}
    for folder, _, files in os.walk(top, followlinks=True):
        name = ".".join(["pikv_hf", *Path(folder).relative_to(top).parts])
        if any(file.endswith(".py") for file in files) and not name.startswith(NOT_IN_WHEEL):
            found[name] = Path(folder)
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


def test_every_folder_with_modules_is_a_package():
    assert [folder for folder in shipped_folders().values() if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_every_module_and_data_file(wheel):
    expected = {"pikv_hf/py.typed"}
    for name, folder in shipped_folders().items():
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
    assert set(shipped_folders()) <= set(loaded)
    # An editable install of the repository must not stand in for what the wheel lacks.
    assert {name for name, file in loaded.items() if not Path(file).is_relative_to(target)} == set()


# A bare install.


def requirements_of(extra: str) -> set[str]:
    """Return the distributions of an extra of pyproject.toml, those of extras that it includes among them."""
    found = set()
    for text in PYPROJECT["project"]["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PYPROJECT["project"]["name"]:
            found |= {name for included in requirement.extras for name in requirements_of(included)}
        else:
            found.add(canonicalize_name(requirement.name))
    return found


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_messages_name_the_extra_that_brings_a_module(extra):
    brought_by = importlib.metadata.packages_distributions()
    assert {canonicalize_name(brought_by[module][0]) for module in EXTRAS[extra]} == requirements_of(extra)


def with_their_dependencies(requirements: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that pip would install for some requirements, and for theirs."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, asked_extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked_extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras:
            found[name] = importlib.metadata.distribution(name)
            theirs = [Requirement(text) for text in found[name].requires or ()]
            waiting += [(each, extra) for each in theirs for extra in ("", *requirement.extras)]
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, and link there what pip would install with it: no network, seconds."""
    environment = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=environment)
    python = str(environment / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip())
    for distribution in with_their_dependencies(PYPROJECT["project"]["dependencies"]).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--quiet")
    run(*pip, str(wheel), cwd=environment)
    return environment


def run_bare(bare: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the bare environment, without what this process adds to the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program, *arguments = command
    return subprocess.run(
        [str(bare / "bin" / program), *arguments],
        cwd=bare,
        env=environment | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bare_install_generates_what_dynamic_cache_does_and_has_all_of_the_core(bare):
    # One process: torch and transformers take seconds to import.
    result = run_bare(bare, "python", "-c", GENERATE + IMPORT_CORE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from pikv_hf.eval import evaluate_cache",
            r'pikv_hf\.eval\.evaluate_cache needs \w+: pip install "\.\[eval\]" in a clone of pikv-hf',
        ),
        (
            "import pikv_hf.eval.report",
            r'pikv_hf\.eval\.report needs \w+: pip install "\.\[eval\]" in a clone of pikv-hf',
        ),
        (
            "import pikv_hf.eval.metrics",
            r'pikv_hf\.eval\.metrics needs \w+: pip install "\.\[eval\]" in a clone of pikv-hf',
        ),
    ],
)
def test_python_says_what_is_missing(bare, code, message):
    lines = run_bare(bare, "python", "-c", code).stderr.splitlines()
    assert re.fullmatch(rf"pikv_hf\.common\.extras\.MissingExtraError: {message}", lines[-1])


@pytest.mark.parametrize("command", [("eval", "ruler", "--limit", "1"), ("report", ".")])
def test_the_command_says_in_one_line_what_is_missing(bare, command):
    result = run_bare(bare, "pikv", *command)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        rf'Error: pikv {command[0]} needs \w+: pip install "\.\[eval\]" in a clone of pikv-hf\n', result.stderr
    )


def test_the_command_says_that_even_its_own_library_is_missing(bare):
    # transformers brings typer today; pikv-hf itself does not ask for it.
    code = "import sys; sys.modules['typer'] = None; from pikv_hf.eval.cli.console import main; main()"
    result = run_bare(bare, "python", "-c", code)
    assert (result.returncode, result.stderr) == (
        2,
        'Error: pikv needs typer: pip install ".[eval]" in a clone of pikv-hf\n',
    )


def test_a_bare_install_plans(bare):
    result = run_bare(bare, "pikv", "plan", "--model", "Qwen3-30B-A3B", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)
