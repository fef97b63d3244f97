"""What each of two processes does with a golden file: `python -P golden_processes.py save|load FOLDER RESULTS`.

Both save the cache of the kind `processes` to FOLDER, or load it from there and go on; rank r writes what came out to
the folder `RESULTS/r`.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from golden_caches import Outcome, load, model_of, outcome, save_golden
from torch.multiprocessing.spawn import start_processes

RANKS, KIND = 2, "processes"


def work(rank: int, doing: str, folder: str, results: str) -> None:
    """Do it in one of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=RANKS)
    if doing == "save":
        save_golden(Path(folder), KIND)
    else:
        model, mine = model_of(KIND), Path(results) / str(rank)
        mine.mkdir()
        chunk = Outcome.read(Path(folder), KIND).chunk
        outcome(model, load(model, Path(folder), KIND), chunk).write(mine, KIND)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes(work, args=tuple(sys.argv[1:]), nprocs=RANKS, start_method="fork")
