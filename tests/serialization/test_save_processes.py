"""Processes save and load a part each; what one cannot, none does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from child_processes import SUPPORT, environment
from divided_caches import names
from families import FAMILIES
from save_processes import CASES, RANKS

from pikv_hf import PiKVCache
from pikv_hf.serialization.tensor_file import CacheFileError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_tokens_count")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return what two processes left: their folder, and what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    script = SUPPORT / "save_processes.py"
    subprocess.run([sys.executable, "-P", script, folder], env=environment(), check=True, timeout=120)
    return folder, [json.loads((folder / f"found-{rank}").read_text()) for rank in range(RANKS)]


Found = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("case", CASES)
def test_processes_go_on(case: str, processes: Found) -> None:
    ranks = [found[case] for found in processes[1]]
    for found in ranks:
        assert found["files"] == [f"{case}.0-of-2", f"{case}.1-of-2"]
        assert found["logits"][0] == found["logits"][1] == ranks[0]["logits"][0]
        assert found["held"][0] == found["held"][1]
    assert ranks[0]["held"] != ranks[1]["held"]


def test_what_one_process_cannot_load_none_does(processes: Found) -> None:
    first, second = (found["failures"] for found in processes[1])
    assert first["as it was"] == second["as it was"] == "no error"
    for found in (first, second):
        assert "the files of ranks 0 and 1 are of different saves" in found["mixed"]
        assert found["mixed"].startswith("CacheFileError")
        assert found["another model"].startswith("CacheFileError")
        assert found["never saved"].startswith("FileNotFoundError")
    assert second["damaged"].startswith("CacheFileError")
    assert "is damaged: checksum" in second["damaged"]
    assert second["missing"].startswith("FileNotFoundError")
    told = "ProcessError: rank 0: rank 1 could not load the cache: "
    assert first["damaged"].startswith(told + "CacheFileError")
    assert first["missing"].startswith(told + "FileNotFoundError")


def test_what_one_process_cannot_save_none_does(processes: Found) -> None:
    first, second = (found["save fails"] for found in processes[1])
    assert first["error"].startswith("ProcessError: rank 0: rank 1 could not save the cache: OSError")
    assert second["error"].startswith("OSError: [Errno 28] No space left on device")
    assert "none.1-of-2" in second["error"]
    for found in (first, second):
        assert found["unchanged"]
        assert found["goes on"]
        assert not found["left"]


def test_a_process_that_dies_while_it_saves(processes: Found) -> None:
    assert processes[1][0]["dies"].startswith("ProcessError: rank 0 of 2 got no answer")


def test_files_of_processes_in_one_process(processes: Found) -> None:
    folder, _ = processes
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    for devices in (None, names(2)):
        with pytest.raises(CacheFileError, match="was saved by 2 processes, and is to be loaded by 1"):
            PiKVCache.load(folder / "none", model, devices=devices)
        with pytest.raises(
            CacheFileError, match=r'it holds the part of rank 1 of 2 processes; .*process_group="world"'
        ):
            PiKVCache.load(folder / "none.1-of-2", model, devices=devices)
    with pytest.raises(RuntimeError, match="needs several processes"):
        PiKVCache.load(folder / "none", model, process_group="world")
