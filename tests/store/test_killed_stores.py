"""Processes that are killed at any moment leave a folder that still answers rightly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_processes import environment
from context_prompts import GREEDY, OPTIONS
from context_worker import LIMIT, prompt_of
from families import FAMILIES

from pikv_hf import ContextStore

WORKER = Path(__file__).parents[1] / "support" / "context_worker.py"
KILLED, TOGETHER = 200, 50


@pytest.mark.slow
def test_two_hundred_are_killed(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    draw = torch.Generator().manual_seed(0)
    for first in range(0, KILLED, TOGETHER):
        command = [sys.executable, "-P", str(WORKER), str(tmp_path), str(first), str(TOGETHER)]
        subprocess.run(command, check=True, env=environment())
        store = ContextStore(model, path=tmp_path, disk=LIMIT, placement="hash", **OPTIONS)
        for _ in range(10):
            prompt = prompt_of(draw)
            assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        stats = store.stats()
        assert stats.errors == 0
        assert stats.tokens_loaded
        assert sum(file.stat().st_size for file in tmp_path.glob("*/ctx-*")) <= LIMIT
        assert not list(tmp_path.glob("*/.pikv-*.tmp"))
