"""Log training statistics: losses, and accuracy per task."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv_hf.eval.training.batches import FORM_WEIGHT, LOOKUP_WEIGHT
from pikv_hf.eval.training.curriculum import Progress
from pikv_hf.eval.training.documents import TRAINING_TASKS


def count_correct(correct: Tensor, weights: Tensor, tasks: Tensor) -> dict[str, Tensor]:
    """Count supervised tokens and right predictions per task.

    Parameters
    ----------
    correct, weights, tasks : Tensor
        ``[N]`` for every supervised token: whether it was predicted (bool), its loss weight (float32) and its task
        (int64).

    Returns
    -------
    dict[str, Tensor]
        ``[tasks, 2]`` float32 counts (asked, right): ``"lookup"`` of the tokens that must be found in the context,
        ``"answer"`` of all answer tokens. Failures on repeated digits show only in the latter.
    """
    counts = {}
    for name, least in (("lookup", LOOKUP_WEIGHT), ("answer", FORM_WEIGHT)):
        chosen = weights >= least
        table = torch.zeros(len(TRAINING_TASKS), 2)
        table[:, 0] = torch.bincount(tasks[chosen], minlength=len(TRAINING_TASKS))
        table[:, 1] = torch.bincount(tasks[chosen & correct], minlength=len(TRAINING_TASKS))
        counts[name] = table
    return counts


class MetricsLog:
    """Averages statistics over steps and appends them to a file, one JSON object per line.

    Parameters
    ----------
    path : Path
        File to append to.
    every : int
        Steps per record.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._reset()

    def add(self, statistics: dict[str, Tensor], progress: Progress) -> dict[str, Any] | None:
        """Count one step; after ``every`` steps write and return a record."""
        for name, value in statistics.items():
            self._totals[name] = self._totals.get(name, 0) + value
        self._steps += 1
        if self._steps < self._every:
            return None
        record = self._record(progress)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._reset()
        return record

    def _reset(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._steps = 0
        self._start = time.monotonic()

    def _record(self, progress: Progress) -> dict[str, Any]:
        loss, balance = (self._totals["loss"] / self._steps).tolist()
        norm = self._totals["norm"].item() / self._steps
        shares = {kind: (self._totals[kind][:, 1] / self._totals[kind][:, 0]).tolist() for kind in ("lookup", "answer")}
        asked = self._totals["lookup"][:, 0].tolist()
        return {
            "step": progress.step,
            "stage": progress.stage,
            "pool": progress.pool,
            "loss": round(loss, 4),
            "balance": round(balance, 4),
            "norm": round(norm, 3),
            "tokens_per_second": round(self._totals["tokens"].item() / (time.monotonic() - self._start)),
            "accuracy": {
                name: [round(shares["lookup"][index], 3), round(shares["answer"][index], 3)]
                for index, name in enumerate(TRAINING_TASKS)
                if asked[index]
            },
        }
