"""What each of two processes does with a cache that they save together; see tests/serialization/test_save_processes.py.

`python -P save_processes.py FOLDER` imports everything once, forks them, and leaves a file of results for each.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from families import FAMILIES
from torch.multiprocessing.spawn import start_processes

from pikv_hf import PiKVCache
from pikv_hf.serialization import save_load as serialization
from pikv_hf.serialization.rank_files import rank_file

RANKS = 2
OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 5, "rank": 4}
#: Saved, loaded and gone on with, by name.
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "int4": {"key_codec": "int4", "value_codec": "int4", "placement": "balanced"},
    "budget": {"key_codec": "lowrank", "value_codec": "int8", "budget": 60, "scheduler": "quest"},
}


@torch.no_grad()
def continued(model: Any, cache: PiKVCache) -> list[Any]:
    """Read a chunk, go on greedily, and return tokens and logits."""
    ids, found = torch.arange(5, 14).expand(2, -1), []
    for _ in range(12):
        logits = model(ids, past_key_values=cache).logits[:, -1]
        ids = logits.argmax(dim=-1, keepdim=True)
        found.append([ids.tolist(), logits.double().tolist()])
    return found


def outcome(work: Callable[[], Any]) -> str:
    """Return which error something ends with."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Rank:
    """One of the processes."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)

    @torch.no_grad()
    def new(self, tokens: int = 120, **options: Any) -> PiKVCache:
        """Return a cache that has read some tokens."""
        cache = PiKVCache.for_model(self.model, process_group="world", timeout=60, **OPTIONS, **options)
        ids = torch.randint(3, 190, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        self.model(ids[:, :-1], past_key_values=cache)
        self.model(ids[:, -1:], past_key_values=cache)
        return cache

    def load(self, name: str, **options: Any) -> PiKVCache:
        """Load with the other process."""
        return PiKVCache.load(self.folder / name, self.model, process_group="world", timeout=60, **options)

    def file(self, name: str, rank: int = 1) -> Path:
        """Return the file of a rank."""
        return rank_file(self.folder / name, rank, RANKS)

    def round_trip(self, name: str) -> dict[str, Any]:
        """Save, load, and go on with both."""
        cache = self.new(**CASES[name])
        cache.save(self.folder / name)
        files = sorted(path.name for path in self.folder.iterdir() if path.name.startswith((name, ".pikv")))
        held = [
            cache.layers[0].table.view.stored_mask(cache.layers[0].seen).tolist() for cache in (cache, self.load(name))
        ]
        loaded = self.load(name)
        return {"files": files, "held": held, "logits": [continued(self.model, each) for each in (cache, loaded)]}

    def failures(self) -> dict[str, str]:
        """Return what each of these ends with."""
        self.new(tokens=90).save(self.folder / "other")
        found = {"as it was": outcome(lambda: self.load("none"))}
        for name, harm in (("mixed", self.mix), ("damaged", self.damage), ("missing", Path.unlink)):
            if self.rank == 1:
                for rank in range(RANKS):
                    shutil.copy(self.file("none", rank), self.file(name, rank))
                harm(self.file(name))
            dist.barrier()
            found[name] = outcome(lambda name=name: self.load(name))
        found["never saved"] = outcome(lambda: self.load("nothing"))
        found["another model"] = outcome(
            lambda: PiKVCache.load(self.folder / "none", FAMILIES["llama"].build(), process_group="world", timeout=60)
        )
        return found

    def mix(self, path: Path) -> None:
        """Replace a file by that of another save."""
        shutil.copy(self.file("other"), path)

    def damage(self, path: Path) -> None:
        """Flip a bit of the last tensor."""
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def save_failing(self) -> dict[str, Any]:
        """Fail to save in one process: both raise, older files stay, and the cache goes on."""
        cache, reference, before = self.new(), self.new(), self.file("none", self.rank).read_bytes()
        write = serialization.write_tensors
        if self.rank == 1:
            serialization.write_tensors = no_space_left
        error = outcome(lambda: cache.save(self.folder / "none"))
        serialization.write_tensors = write
        dist.barrier()
        return {
            "error": error,
            "unchanged": self.file("none", self.rank).read_bytes() == before,
            "left": [path.name for path in self.folder.iterdir() if path.name.startswith(".pikv")],
            "goes on": continued(self.model, cache) == continued(self.model, reference),
        }

    def save_dying(self) -> str:
        """Die in one process while both save."""
        cache = self.new()
        if self.rank == 1:
            serialization.write_tensors = lambda *_: os._exit(0)
        return outcome(lambda: cache.save(self.folder / "none"))


def no_space_left(*_: Any) -> None:
    """Stand in for writing to a disk that is full."""
    raise OSError(28, "No space left on device", "the staged file")


def work(rank: int, folder: str) -> None:
    """Do all of it, and write down what came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    mine = Rank(rank, Path(folder))
    found: dict[str, Any] = {name: mine.round_trip(name) for name in CASES}
    found |= {"failures": mine.failures(), "save fails": mine.save_failing()}
    (Path(folder) / f"found-{rank}").write_text(json.dumps(found))
    dist.barrier()
    error = mine.save_dying()
    (Path(folder) / f"found-{rank}").write_text(json.dumps({**found, "dies": error}))
    # What is left of the group waits for nobody.
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes(work, args=(sys.argv[1],), nprocs=RANKS, start_method="fork")
