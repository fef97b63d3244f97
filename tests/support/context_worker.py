"""Processes that ask a store of contexts, and are killed at any moment: `python context_worker.py FOLDER SEED COUNT`.

Each is forked from the one before all, which has the model; two run at a time.
"""

import os
import random
import signal
import sys
import time
import warnings

import torch
from context_prompts import GREEDY, OPTIONS, ids, joined
from families import FAMILIES

from pikv_hf import ContextStore

LIMIT = 2_000_000
PIECES = [ids(length, number) for number, length in enumerate((24, 9, 17, 40))]


def prompt_of(draw: torch.Generator) -> torch.Tensor:
    """Return a prompt of one to four pieces."""
    count = int(torch.randint(1, 5, (1,), generator=draw))
    return joined(*(PIECES[number] for number in torch.randint(len(PIECES), (count,), generator=draw).tolist()))


def ask(folder: str, seed: int, begun: int) -> None:
    """Ask without end; write a byte to `begun` after each answer."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        store = ContextStore(model, path=folder, disk=LIMIT, placement="hash", **OPTIONS)
        for _ in range(5):
            store.generate(prompt_of(draw), **GREEDY)
            os.write(begun, b".")


def forked(folder: str, seed: int) -> tuple[int, int]:
    """Return the number of a new process that asks, and where it says that it has begun."""
    out, begun = os.pipe()
    if not (process := os.fork()):
        ask(folder, seed, begun)
    os.close(begun)
    return process, out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = FAMILIES["llama"].build()
    folder, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(first)
    for seed in range(first, first + count, 2):
        for process, out in [forked(folder, seed), forked(folder, seed + 1)]:
            assert os.read(out, 1) == b"."
            time.sleep(moments.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
            assert os.waitpid(process, 0)[1] == signal.SIGKILL
            os.close(out)
