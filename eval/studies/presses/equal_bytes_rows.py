"""Summarise what the study of presses at equal bytes kept: scores with intervals, bytes, differences to PiKVPress."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pikv_hf.eval.report.result_rows import write_rows
from pikv_hf.eval.runner.run_summary import by_task, interval
from pikv_hf.eval.studies.kept_rows import kept

Row = dict[str, Any]

#: Of a file of samples, by what its name says.
SUFFIX = ".jsonl.gz"
#: What others are compared with, at the same share.
COMPARED = "PiKVPress"
#: Samples of a task that a bootstrap interval needs: of one it would have no width.
FEWEST = 5
METRIC = (
    "score: mean over tasks of RULER's score in percent, with a 95% bootstrap interval over samples within tasks where "
    "each task has five; kv_share: live bytes of the cache after compression, measured, over those of DynamicCache in "
    "bfloat16; share: what the press was asked to leave. Presses that go head by head are on "
    "PiKVCache(recent_window=0, sink_tokens=0, num_shards=1), which frees what they evict. difference: to PiKVPress at "
    "the same share, over samples of both"
)


def write_results(parts: Path, output: Path, version: str, left_out: Mapping[str, str]) -> None:
    """Write the results of all parts in a folder: rows of one setting after the other, and what could not be run."""
    rows: list[Row] = []
    errors: list[Row] = []
    files = sorted(parts.glob(f"*{SUFFIX}"), key=_place)
    for file in files:
        model, dtype, tokens, question, seed = file.name.removesuffix(SUFFIX).rsplit("-", 4)
        current = [row for row in kept(file) if row["version"] == version or row["version"].startswith("kvpress ")]
        setting = {"model": model, "dtype": dtype, "tokens": int(tokens), "question": question, "seed": int(seed)}
        rows += [setting | row for row in rows_of(current)]
        errors += [setting | row for row in errors_of(current)]
    reasons = [{"press": press, "why": why} for press, why in left_out.items()]
    write_rows(output, {"metric": METRIC, "version": version}, {"scores": rows, "failed": errors, "left_out": reasons})


def _place(file: Path) -> tuple[Any, ...]:
    model, dtype, tokens, question, seed = file.name.removesuffix(SUFFIX).rsplit("-", 4)
    return model, dtype, question != "unseen", int(tokens), int(seed)


def rows_of(measured: Sequence[Row]) -> list[Row]:
    """Return a row per press and share, of the samples that have a score."""
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in measured:
        if "score" in row:
            cells.setdefault((row["press"], row["share"]), []).append(row)
    return [_summary(press, share, rows, cells.get((COMPARED, share), [])) for (press, share), rows in cells.items()]


def _summary(press: str, share: float, rows: Sequence[Row], compared: Sequence[Row]) -> Row:
    tasks = by_task(rows)
    score, *bounds = _bounds(tasks.values())
    return {
        "press": press,
        "share": share,
        "samples": len(rows),
        "kv_share": fmean(row["kv_share"] for row in rows),
        "score": score,
        **dict(zip(("low", "high"), bounds, strict=False)),
        "tasks": {task: round(100 * fmean(row["score"] for row in group), 1) for task, group in tasks.items()},
        **({} if press == COMPARED else _difference(rows, compared)),
    }


def _difference(rows: Sequence[Row], compared: Sequence[Row]) -> Row:
    """Return by how much a press is above the other, of the samples that both have."""
    others = {row["id"]: row["score"] for row in compared}
    pairs = [row | {"score": row["score"] - others[row["id"]]} for row in rows if row["id"] in others]
    if not pairs:
        return {}
    return {"pairs": len(pairs), "difference": [round(bound, 1) for bound in _bounds(by_task(pairs).values())]}


def _bounds(groups: Iterable[Sequence[Row]]) -> list[float]:
    """Return the mean over tasks in percent, and its interval if every task has enough samples to tell of one."""
    scores = [[row["score"] for row in group] for group in groups]
    found = interval(scores)
    names = ("mean", "low", "high") if min(map(len, scores)) >= FEWEST else ("mean",)
    return [100 * found[name] for name in names]


def errors_of(measured: Sequence[Row]) -> list[Row]:
    """Return what each press that failed said, once per share."""
    found: dict[tuple[str, float, str], int] = {}
    for row in measured:
        if "error" in row:
            key = row["press"], row["share"], row["error"]
            found[key] = found.get(key, 0) + 1
    return [
        {"press": press, "share": share, "samples": count, "error": error}
        for (press, share, error), count in found.items()
    ]
