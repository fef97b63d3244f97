"""Train the bundled reference model: ``python -m pikv_hf.eval.training.train``.

Two single-threaded processes on two cores are faster than one process with two threads at this size. The command can be
interrupted at any time; running it again continues from the last checkpoint in ``--work-dir``.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rich.progress
import torch
import torch.distributed as dist
from rich.console import Console
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerFast

from pikv_hf.eval.reference.load import CHECKPOINT, write_digest
from pikv_hf.eval.reference.tokenizer import build_tokenizer
from pikv_hf.eval.training.metrics import MetricsLog
from pikv_hf.eval.training.trainer import Settings, Trainer

# glibc returns and faults in the large temporary buffers of every step anew unless told to keep them; that costs a
# third to a half of the CPU time. The variables are read when a process starts, so the workers inherit them.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the training script."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    work_dir = cache / "pikv_hf" / "train_reference"
    out = Path(__file__).parents[1] / "reference_model"
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=out, help="model folder")
    parser.add_argument("--work-dir", type=Path, default=work_dir, help="checkpoint and metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="one per core")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on all stages, for a smoke test")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--max-minutes", type=float, help="stop after this time (with a checkpoint)")
    return parser.parse_args(argv)


def worker(rank: int, world: int, store: str, settings: Settings, max_minutes: float | None, out: Path) -> None:
    """One training process; rank 0 also logs, saves checkpoints and, at the end, the model."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    tokenizer = build_tokenizer()
    trainer = Trainer(settings, tokenizer, rank, world)
    # Rank 0 must not replace the checkpoint before everybody has read it.
    dist.barrier()
    _train(trainer, max_minutes)
    if rank == 0:
        trainer.save()
        if trainer.finished:
            export(trainer, tokenizer, out)
    dist.barrier()
    dist.destroy_process_group()


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the model, its tokenizer, the training record and the checkpoint's digest to ``out``."""
    trainer.model.save_pretrained(out)
    # safetensors writes files that only their owner may read, which would end up so in an installed package.
    (out / CHECKPOINT).chmod(0o644)
    tokenizer.save_pretrained(out)
    record = {"seed": trainer.settings.seed, **trainer.progress.as_dict()}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_digest(out)


def _train(trainer: Trainer, max_minutes: float | None) -> None:
    """Step until the curriculum is done or the time is over; rank 0 reports and saves on the way."""
    console = Console(log_path=False, width=240) if trainer.rank == 0 else Console(quiet=True)
    log = MetricsLog(trainer.settings.work_dir / "metrics.jsonl", trainer.settings.log_every)
    start = saved = time.monotonic()
    with rich.progress.Progress(console=console, disable=trainer.rank != 0) as bar:
        task = bar.add_task("training")
        while not trainer.finished and not _time_is_over(start, max_minutes):
            statistics = trainer.train_step()
            if trainer.rank != 0:
                continue
            bar.update(task, completed=trainer.progress.step, total=trainer.planned_steps)
            record = log.add(statistics, trainer.progress)
            if record is not None:
                console.log(_summary(record))
            if time.monotonic() - saved > 60 * trainer.settings.checkpoint_minutes:
                trainer.save()
                saved = time.monotonic()


def _time_is_over(start: float, max_minutes: float | None) -> bool:
    """Rank 0's clock decides for everybody: a process that stops alone leaves the others waiting."""
    if max_minutes is None:
        return False
    over = torch.tensor(float(time.monotonic() - start > 60 * max_minutes))
    dist.broadcast(over, src=0)
    return bool(over)


def _summary(record: dict[str, Any]) -> str:
    """One line: step, loss and per task the accuracy of looked-up tokens / of all answer tokens."""
    accuracy = "  ".join(f"{name} {lookup:.2f}/{answer:.2f}" for name, (lookup, answer) in record["accuracy"].items())
    return (
        f"stage {record['stage'] + 1} step {record['step']:5d} pool {record['pool']:3d} loss {record['loss']:.3f} "
        f"balance {record['balance']:.3f} norm {record['norm']:.2f} {record['tokens_per_second']:6d} tok/s  {accuracy}"
    )


def main(argv: list[str] | None = None) -> None:
    """Train, or continue training, and save the model."""
    arguments = parse_arguments(argv)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.work_dir, arguments.seed, arguments.steps_scale, arguments.checkpoint_minutes)
    os.environ.update(ALLOCATOR | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "rendezvous")
        options = (arguments.processes, store, settings, arguments.max_minutes, arguments.out)
        # Workers are daemons, which end with this process when it exits in an orderly way, as on SIGTERM.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; run again to continue"))
        spawn(worker, options, nprocs=arguments.processes, daemon=True)


if __name__ == "__main__":
    main()
