"""Processes with a cache on disk that end, are killed or outlive each other: `python tiers_in_a_process.py FOLDER`.

Each of :data:`SCENES` is played by a process of its own, forked before it has a cache. It prints its name, and `right`
for each process whose tokens are those of `DynamicCache`. At the end of a scene nothing may be left in the folder.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, VOCAB
from tiered_runs import LAYOUT, generate
from transformers import DynamicCache

from pikv_hf import PiKVCache

SCENES = ("SIGTERM", "SIGKILL", "the child ends first", "the parent ends first", "the parent is killed")


def main(folder: Path) -> None:
    """Play all scenes."""
    torch.set_num_threads(1)
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    ids = torch.randint(2, VOCAB - 1, (1, 120), generator=torch.Generator().manual_seed(3))
    expected = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=24)
    for scene in SCENES:
        print(scene, flush=True)
        reads, writes = os.pipe()
        if not (first := os.fork()):
            os.close(reads)
            play(scene, writes, (model, ids, expected), folder)
            # As any program ends: what is to be done at its exit is done.
            sys.exit()
        os.close(writes)
        assert os.read(reads, 1) == b"+", "nothing is on disk"
        if scene in ("SIGTERM", "SIGKILL"):
            os.kill(first, getattr(signal, scene))
        # Until every process of the scene has ended.
        while os.read(reads, 1):
            pass
        os.close(reads)
        os.waitpid(first, 0)
        print("left:", sorted(each.name for each in folder.iterdir()), flush=True)


def play(scene: str, alive: int, given: tuple[Any, Any, Any], folder: Path) -> None:
    """Play a scene; `alive` is a pipe that closes when all of its processes have ended."""
    signal.alarm(60)
    model, ids, expected = given
    cache = PiKVCache.for_model(model, **LAYOUT, tiers={"cpu": "16KiB", "disk": None}, tier_directory=str(folder))
    got = generate(model, ids, cache, max_new_tokens=12)
    if cache.tiers.bytes_used()["disk"] > 10_000:
        os.write(alive, b"+")
    if scene in ("SIGTERM", "SIGKILL"):
        time.sleep(60)
    first, child = os.getpid(), os.fork()
    if scene == "the child ends first" and child:
        os.waitpid(child, 0)
    elif scene == "the parent is killed" and child:
        time.sleep(60)
    elif scene != "the child ends first" and not child:
        signal.alarm(60)
        if scene == "the parent is killed":
            os.kill(first, signal.SIGKILL)
        while os.getppid() == first:
            time.sleep(0.01)
    if torch.equal(generate(model, got, cache, max_new_tokens=12), expected):
        print("right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
