"""Train the reference model data-parallel: one process per core, gradients averaged with gloo.

Every process draws its own documents from (seed, step, rank) and applies the same averaged gradient, so parameters and
optimizer states stay identical everywhere and one process's checkpoint is everybody's.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pikv_hf.eval.training.batches import Batch, BatchBuilder
from pikv_hf.eval.training.curriculum import CURRICULUM, Progress, scaled
from pikv_hf.eval.training.documents import TRAINING_TASKS
from pikv_hf.eval.training.metrics import count_correct
from pikv_hf.eval.training.model import balance_loss, build_model, build_optimizers

BALANCE_WEIGHT = 0.01
CLIP_NORM = 1.0
CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of a training run.

    Attributes
    ----------
    work_dir : Path
        Folder of the checkpoint and the metrics.
    seed : int
        Fixes the initial weights and all documents.
    steps_scale : float
        Factor on the steps of every stage (at least one step each), for a smoke test.
    checkpoint_minutes : float
        Wall time between checkpoints.
    log_every : int
        Steps per line of the log.
    """

    work_dir: Path
    seed: int = 0
    steps_scale: float = 1.0
    checkpoint_minutes: float = 3.0
    log_every: int = 25


class Trainer:
    """One process of a training run.

    Parameters
    ----------
    settings : Settings
        Options, the same in every process.
    tokenizer : PreTrainedTokenizerFast
        The reference tokenizer.
    rank, world : int
        This process and their number; with more than one, ``torch.distributed`` must be initialised.
    """

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, rank: int = 0, world: int = 1) -> None:
        self.settings = settings
        self.rank = rank
        self.world = world
        self.progress = Progress()
        self.model = build_model(tokenizer, settings.seed)
        self.optimizers = build_optimizers(self.model)
        self.learning_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.batches = BatchBuilder(tokenizer)
        self._balance: list[Tensor] = []
        self._gradient = self._flatten_gradients()
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record_balance)
        self._clock = (time.monotonic(), time.process_time())
        if self.checkpoint.exists():
            self._load()
        self.progress.runs += 1

    @property
    def checkpoint(self) -> Path:
        """Where the resumable state is kept."""
        return self.settings.work_dir / CHECKPOINT_NAME

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.progress.stage >= len(CURRICULUM)

    @property
    def planned_steps(self) -> int:
        """Steps of the whole run; an upper bound while the first stage is growing its pool."""
        stages, scale = CURRICULUM[self.progress.stage :], self.settings.steps_scale
        return self.progress.step - self.progress.stage_step + sum(scaled(stage.steps, scale) for stage in stages)

    def next_batch(self) -> Batch:
        """This process's share of the next step's documents, a function of seed, step, rank and curriculum state."""
        stage = CURRICULUM[self.progress.stage]
        length, rows = stage.shapes[self.progress.stage_step % len(stage.shapes)]
        # The same in every process, so that all of them get equally expensive batches.
        pose = random.Random(f"pose {self.settings.seed} {self.progress.step}").random() < stage.pose_share
        return self.batches.build(
            random.Random(f"batch {self.settings.seed} {self.progress.step} {self.rank}"),
            length,
            rows // self.world,
            self.progress.mix(stage),
            self.progress.keys(),
            stage.pose_span if pose else None,
        )

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step.

        Returns
        -------
        dict[str, Tensor]
            Over all processes: the counts of :func:`count_correct`, ``"loss"`` ``[2]`` (cross-entropy, balance),
            ``"norm"`` of the gradient before clipping and ``"tokens"`` of the step.
        """
        stage = CURRICULUM[self.progress.stage]
        batch = self.next_batch()
        self._gradient.zero_()
        loss, statistics = self._loss(batch)
        loss.backward()
        statistics = self._reduce(statistics)
        statistics["norm"] = self._clip()
        self._update(self.progress.learning_rate(stage, self.settings.steps_scale))
        asked, right = statistics["lookup"][list(TRAINING_TASKS).index("recall")].tolist()
        statistics["tokens"] = torch.tensor(batch.ids.numel() * self.world)
        self.progress.advance(
            stage, right / asked if asked else None, int(statistics["tokens"]), self.settings.steps_scale
        )
        return statistics

    def save(self) -> None:
        """Write the resumable state; a reader sees the old file or the new one, never a part."""
        self._count_time()
        state = {
            "seed": self.settings.seed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": self.progress.as_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        """Continue from the checkpoint."""
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        if state["seed"] != self.settings.seed:
            raise ValueError(f"{self.checkpoint} was trained with seed {state['seed']}, not {self.settings.seed}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def _count_time(self) -> None:
        """Add the time since the last call to the totals (CPU time: this process times their number)."""
        now = (time.monotonic(), time.process_time())
        self.progress.wall_seconds += now[0] - self._clock[0]
        self.progress.cpu_seconds += (now[1] - self._clock[1]) * self.world
        self._clock = now

    def _flatten_gradients(self) -> Tensor:
        """Let all gradients be views of one vector, which one collective can average."""
        parameters = list(self.model.parameters())
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return flat

    def _record_balance(self, gate: Any, inputs: tuple[Tensor, ...], _outputs: Any) -> None:
        self._balance.append(balance_loss(inputs[0].flatten(0, -2), gate.weight, gate.top_k))

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy of the supervised tokens plus the load-balancing loss, and statistics."""
        self._balance.clear()
        # The mask is given although nothing is masked: without one, transformers takes a jump in the position ids
        # for the beginning of another sequence and cuts attention there.
        hidden = self.model.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=torch.ones_like(batch.ids),
            use_cache=False,
        ).last_hidden_state
        supervised = batch.weights[:, 1:] > 0
        logits = self.model.lm_head(hidden[:, :-1][supervised])
        targets = batch.ids[:, 1:][supervised]
        weights = batch.weights[:, 1:][supervised]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        balance = torch.stack(self._balance).mean()
        rows = batch.tasks[:, None].expand_as(supervised)[supervised]
        with torch.no_grad():
            statistics = count_correct(logits.argmax(-1) == targets, weights, rows)
            statistics["loss"] = torch.stack([loss, balance])
        return loss + BALANCE_WEIGHT * balance, statistics

    def _reduce(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average the gradient and sum the statistics over all processes."""
        if self.world == 1:
            return statistics
        dist.all_reduce(self._gradient)
        self._gradient /= self.world
        flat = torch.cat([value.flatten() for value in statistics.values()])
        dist.all_reduce(flat)
        pieces = flat.split([value.numel() for value in statistics.values()])
        summed = {k: piece.view_as(v) for (k, v), piece in zip(statistics.items(), pieces, strict=True)}
        summed["loss"] /= self.world
        return summed

    def _clip(self) -> Tensor:
        """Scale the gradient to norm 1 if it is longer; returns its norm before."""
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient *= (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def _update(self, scale: float) -> None:
        """Step both optimizers at ``scale`` times their learning rates."""
        for optimizer, rates in zip(self.optimizers, self.learning_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
