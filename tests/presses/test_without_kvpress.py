"""Everything but kvpress's own presses works where kvpress is not installed; each test is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner import presses

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
WITHOUT = "import warnings; warnings.simplefilter('error', ImportWarning); import without_kvpress\n"

PRESSED = """
import json
from press_runs import PRESSES, attached, held_by, ids_of, kept_columns, shared_model
from transformers import DynamicCache

model, found = shared_model(), {}
for name, make in PRESSES.items():
    cache = attached(model)
    kept = kept_columns(model, ids_of(90), make(compression_ratio=0.5), cache)
    found[name] = [cache.nbytes, [layer.int().flatten().tolist() for layer in kept]]
print(json.dumps(found))
"""

OWN_SCORER = """
from dataclasses import dataclass
import torch
from press_runs import attached, held_by, ids_of, padded, read, shared_model
from transformers import DynamicCache
from pikv_hf.presses import QueryAwarePress, RowwisePress
from pikv_hf.presses.press_base import KVPRESS, BasePress, ScorerPress

assert issubclass(QueryAwarePress, ScorerPress) and issubclass(ScorerPress, BasePress)

@dataclass
class Knorm(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)

model = shared_model()
cache, whole = read(model, DynamicCache(), ids_of(90), Knorm(0.4)), read(model, DynamicCache(), ids_of(90))
for layer, before in zip(cache.layers, whole.layers):
    kept = (-before.keys.norm(dim=-1)).topk(int(90 * (1 - 0.4)), dim=-1).indices
    index = kept[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    assert torch.equal(layer.keys, before.keys.gather(2, index))
    assert torch.equal(layer.values, before.values.gather(2, index))
read(model, cache, ids_of(1), Knorm(0.4))
assert cache.get_seq_length() == 55
rows, ids, mask = padded([60, 40])
together = held_by(read(model, attached(model), ids, RowwisePress(Knorm(0.5)), mask))
for row, alone in enumerate(rows):
    for layer, own in zip(together, held_by(read(model, attached(model), alone, RowwisePress(Knorm(0.5))))):
        assert torch.equal(layer[row, :, -alone.shape[1]:].sum(-1), own[0].sum(-1)) or own.all()
assert (KVPRESS is None) == (len(sys.argv) > 1)
"""

COMMANDS = """
import json
from pikv_hf.eval.cli.console import main

for command in map(json.loads, sys.argv[1:]):
    try:
        main(command)
    except SystemExit as ended:
        assert not ended.code, command
"""


def run(code: str, *arguments: str) -> str:
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\n{code}", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_presses_of_this_project_keep_the_same_tokens() -> None:
    assert run(WITHOUT + PRESSED) == run(PRESSED)


def test_a_users_own_scorer_does_what_it_does_with_kvpress() -> None:
    run(WITHOUT + OWN_SCORER, "without")
    run(OWN_SCORER)


def test_commands_run(tmp_path: Path) -> None:
    short = ["--threads", "1"]
    pressed = ["--cache", "pikv", "--press", "PiKVPress", "--ratio", "0.5", "--output", str(tmp_path / "out")]
    commands = [
        ["bench", "press", "--press", "PiKVPress", "--tokens", "64", "--repeats", "1", *short],
        ["demo", "--tokens", "400", "--max-new-tokens", "1", "--json", *short],
        ["eval", "needle", "--length", "256", "--depth", "50", "--samples", "1", *pressed, *short],
        ["plan", "--help"],
    ]
    shown = run(f"{WITHOUT}{COMMANDS}", *(json.dumps(command) for command in commands))
    assert shown.count("PiKVPress") >= 3
    assert list((tmp_path / "out").rglob("predictions.csv*"))


def test_a_press_of_kvpress_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presses, "KVPRESS", None)
    with pytest.raises(InputError, match=r'^unknown press .SnapKV.*; those of kvpress need it: pip install "\.\['):
        presses.press_factory("SnapKVPress", 0.5)
    assert presses.press_factory("PiKVPress", 0.5).ratio == 0.5


def test_a_kvpress_that_cannot_be_imported_is_passed_over_with_a_warning() -> None:
    """One that a newer transformers breaks is no reason for our presses to be missing."""
    broken = """
import importlib.abc, importlib.machinery, warnings

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "kvpress" else None
    def exec_module(self, module):
        raise ImportError("cannot import name 'QuantizedCache'")

sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pikv_hf.presses import PiKVPress
print([str(each.message) for each in caught if "kvpress" in str(each.message)])
"""
    assert "kvpress is installed and cannot be imported, so presses do without it: cannot import name" in run(broken)
