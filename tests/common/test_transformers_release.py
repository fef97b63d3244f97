"""One module knows how releases of transformers differ, and says when the installed one is newer than tested."""

import ast
import functools
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, prompts
from packaging.requirements import Requirement
from packaging.version import Version

from pikv_hf import PiKVCache, attach
from pikv_hf.common import transformers_release
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.runner.meter import Meter
from pikv_hf.eval.runner.perplexity import score_window
from pikv_hf.eval.tasks.perplexity import Window

ROOT = Path(__file__).parents[2]
FOLDERS = ("src/pikv_hf", "kernels", "presses", "eval")
KNOWS = "src/pikv_hf/common/transformers_release.py"
#: These write the version into a file or show it, and decide nothing by it.
RECORD = {
    "src/pikv_hf/serialization/model_fingerprint.py",
    *("eval/demo/demo.py", "eval/provenance.py", "eval/studies/models/run.py", "eval/studies/models/table.py"),
}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in parsed}


def named(node: ast.AST) -> Iterator[str]:
    """Yield what a node of a program names that could tell a version of transformers."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


def asks_for_the_version(tree: ast.AST) -> bool:
    names = {name for node in ast.walk(tree) for name in named(node)}
    suspects = ("transformers.__version__", "packaging.version", "importlib.metadata", "transformers.utils.versions")
    return any(name.startswith(suspects) or "is_transformers_version" in name for name in names)


def names_the_cache(tree: ast.AST) -> bool:
    """Tell whether a program has the older argument's name; in a text among other words it has it not."""
    keywords = {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return "past_key_values" in keywords | constants


def files_that(asked: Callable[[ast.AST], bool]) -> set[str]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return {str(file.relative_to(ROOT)) for file in files if asked(ast.parse(file.read_text(encoding="utf-8")))}


def test_no_other_file_asks_for_the_version() -> None:
    assert files_that(asks_for_the_version) == {KNOWS, *RECORD}


@pytest.mark.parametrize(
    "source",
    [
        "import transformers\nif transformers.__version__ < '5.3':\n    pass",
        "from packaging.version import Version",
        "from transformers import __version__",
        "from importlib.metadata import version",
        "import importlib.metadata",
    ],
)
def test_that_would_be_seen(source: str) -> None:
    assert asks_for_the_version(ast.parse(source))


def test_no_other_file_names_the_argument_of_the_cache() -> None:
    """Releases warn of the other one's name, and some take only their own."""
    assert files_that(names_the_cache) == {KNOWS}


def test_calls_of_ours_are_not_warned_of() -> None:
    """Also where a call is made by torch, whose module a warning is told of then."""
    model = FAMILIES["qwen3_moe"].build()
    ids = prompts(1, 48)["input_ids"]
    window = Window("a", ids, prefill=30, scored=torch.arange(48) >= 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        score_window(model, window, 6, PiKVCache.for_model(model), None, Meter(torch.device("cpu")))
        model.generate(ids, **cache_argument(PiKVCache.for_model(model)), max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("newest", ["5.0.0", transformers.__version__])
def test_a_newer_release_is_warned_of_once_with_both_versions(newest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_release, "NEWEST_TESTED", newest)
    warn = functools.cache(transformers_release.warn_if_newer.__wrapped__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn()
        warn()
    told = [str(warning.message) for warning in caught]
    assert len(told) == (newest == "5.0.0")
    assert all(newest in text and transformers.__version__ in text for text in told)


@pytest.mark.parametrize("begin", [attach, lambda model: PiKVCache(model.config)])
def test_whoever_begins_is_warned(begin: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen3_moe"].build()
    monkeypatch.setattr(transformers_release, "NEWEST_TESTED", "5.0.0")
    transformers_release.warn_if_newer.cache_clear()
    with pytest.warns(UserWarning, match="tested with transformers up to 5.0.0"):
        begin(model)


def test_the_newest_tested_release_is_that_of_the_newest_environment() -> None:
    assert pins("constraints-newest.txt")["transformers"] == transformers_release.NEWEST_TESTED
    assert Version(transformers.__version__) <= Version(transformers_release.NEWEST_TESTED)


def test_the_newest_environment_has_the_other_pins_and_all_dependencies() -> None:
    oldest, newest = pins("constraints.txt"), pins("constraints-newest.txt")
    apart = {"transformers", "tokenizers"}
    assert {name: pin for name, pin in newest.items() if name in oldest.keys() - apart} == {
        name: pin for name, pin in oldest.items() if name in newest.keys() - apart
    }
    # kvpress is installed apart; types and style are checked with the oldest release.
    assert oldest.keys() - newest.keys() == {"kvpress", "mypy", "ruff"}


def test_transformers_has_no_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (Requirement(text).specifier for text in project["dependencies"] if text.startswith("transformers"))
    assert {each.operator for each in bound} == {">="}
    assert pins("constraints.txt")["transformers"] in bound
