"""Result folders as `pikv eval` writes them, made up: for the tests of reports and comparisons."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("niah_single_1", "vt")
HOSTILE = "<script>document.title='ran'</script>"
MACHINE = {"processor": "Test CPU", "cores": 2, "threads": 2, "gpu": None, "system": "Linux"}

Row = dict[str, Any]


def question_rows(
    tasks: Sequence[str] = TASKS, samples: int = 10, wrong: int = 2, answer: str = "no idea"
) -> list[Row]:
    """Rows of which the last `wrong` of each task score 0."""
    return [
        {
            "id": f"{task}-{index:04d}",
            "task": task,
            "length": 1024,
            "question": f"What is number {index}?",
            "answer_prefix": "The number is",
            "answer": json.dumps([str(1000 + index)]),
            "predicted_answer": str(1000 + index) if index < samples - wrong else answer,
            "metric": "string_match",
            "score": float(index < samples - wrong),
        }
        for task in tasks
        for index in range(samples)
    ]


def needle_rows(depths: Sequence[float], lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """One row per depth and length, scored by a seeded coin."""
    rng = random.Random(seed)
    cells = [(depth, length) for depth in depths for length in lengths]
    rows = question_rows(["needle"], samples=len(cells), wrong=0)
    return [
        {**row, "depth": depth, "length": length, "score": float(rng.random() < 0.8)}
        for row, (depth, length) in zip(rows, cells, strict=True)
    ]


def window_rows(samples: int = 6) -> list[Row]:
    """Rows of a perplexity run, which have no questions."""
    return [
        {
            "id": f"window-{index}",
            "task": "perplexity",
            "length": 512,
            "metric": "nats_per_token",
            "score": 1 + index / 8,
        }
        for index in range(samples)
    ]


def estimate(scores: Sequence[float], scale: float = 100) -> dict[str, float]:
    mean = scale * sum(scores) / len(scores)
    return {"mean": mean, "low": mean - 3, "high": mean + 2}


def summary_of(rows: Sequence[Row], label: str, **changes: Any) -> dict[str, Any]:
    """A summary as `pikv eval` writes it; `share` and `speed` set the costs."""
    share, speed, machine = changes.pop("share", 1.0), changes.pop("speed", 1.0), changes.pop("machine", {})
    scores = {task: [row["score"] for row in rows if row["task"] == task] for task in {row["task"]: 0 for row in rows}}
    return {
        "dataset": "ruler",
        "data_dir": "1024",
        "model": "reference",
        "cache": "dynamic",
        "press": None,
        "compression_ratio": 0.0,
        "query_aware": False,
        "label": label,
        "samples": len(rows),
        "measure": {"name": "score", "unit": "%", "higher_is_better": True},
        "score": estimate([sum(values) / len(values) for values in scores.values()]),
        "tasks": {
            task: {"metric": "string_match", "samples": len(values), **estimate(values)}
            for task, values in scores.items()
        },
        "cost": {
            "kv_bytes_prefill": 2**20 * (share or 1),
            "kv_bytes_end": 2**20 * (share or 1) + 1024,
            "kv_share_prefill": share,
            "kv_share_end": share and share + 0.01,
            "kv_share_prefill_dtype": share and share / 2,
            "kv_share_end_dtype": share and share / 2,
            "prefill_tokens_per_s": 2000.0 * speed,
            "decode_tokens_per_s": 50.0 * speed,
            "peak_memory_bytes": 2**30,
            "cuda_peak_bytes": None,
        },
        "provenance": {
            "command": "pikv eval ruler",
            "date": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789abcdef",
            "machine": {**MACHINE, **machine},
            "versions": {"python": "3.11.0", "torch": "2.13.0"},
        },
        **changes,
    }


def write_run(folder: Path, label: str, rows: Sequence[Row] | None = None, **changes: Any) -> Path:
    """Write a result folder; `changes` replace fields of the summary."""
    rows = question_rows() if rows is None else rows
    folder.mkdir(parents=True)
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.json").write_text(json.dumps(summary_of(rows, label, **changes)), encoding="utf-8")
    return folder


def press(name: str, ratio: float, **changes: Any) -> dict[str, Any]:
    """The fields of a run with a press, to be passed to `write_run`."""
    return {"press": name, "compression_ratio": ratio, "share": 1 - ratio, **changes}


def write_suite(parent: Path) -> Path:
    """A baseline, two presses at two ratios, one press that frees nothing, and PiKV, in folders out of order."""
    write_run(parent / "a", "SnapKV 75%", question_rows(wrong=6), **press("SnapKVPress", 0.75, speed=1.5))
    write_run(parent / "b", "SnapKV 50%", question_rows(wrong=4), **press("SnapKVPress", 0.5, speed=1.2))
    write_run(parent / "c", "Knorm 50%", question_rows(wrong=7), **press("KnormPress", 0.5))
    write_run(parent / "d", "AdaKV(SnapKV) 50%", question_rows(wrong=3), **press("AdaKVPress", 0.5, share=1.0))
    write_run(parent / "e", "PiKVCache", question_rows(wrong=2), cache="pikv", share=1.01, speed=2.0)
    write_run(parent / "f", "DynamicCache", question_rows(wrong=2))
    return parent


def edit(path: Path, field: str, value: Any) -> None:
    """Set `a.b` in a JSON file; `...` removes it."""
    content = json.loads(path.read_text())
    *parents, name = field.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    path.write_text(json.dumps(content))
