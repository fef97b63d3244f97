"""Print the tables of a pretrained model in docs/presses.md, from committed results."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.real_model.load import DENSE
from pikv_hf.eval.report.budgets import TOLERANCE
from pikv_hf.eval.report.summary_file import read_summary
from pikv_hf.eval.report.table import NOTHING, Bold, markdown
from pikv_hf.eval.runner.models import REFERENCE
from pikv_hf.eval.studies.presses.equal_bytes_rows import COMPARED
from pikv_hf.eval.studies.presses.equal_bytes_sample import FULL, INT4

Row = dict[str, Any]

#: Whose tables there are, and in which file of results.
MODELS, FILE = (DENSE, REFERENCE), "presses-at-equal-bytes.json"

#: Rows that come first; the others by their score at the shares that all of them were measured at.
_FIRST = (FULL, INT4, COMPARED)


def ceiling_table(folder: Path) -> str:
    """Return what a model scores with all of its cache, in percent: a row per task, a column per run below a folder."""
    runs = sorted((read_summary(file) for file in folder.glob("*/summary.json")), key=lambda run: int(run.data_dir))
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows = [
        [task, *(f"{run.tasks[task].estimate.mean:.1f}" if task in run.tasks else NOTHING for run in runs)]
        for task in tasks
    ]
    counts = [max(task.samples for task in run.tasks.values()) for run in runs]
    names = [f"{int(run.data_dir):,}" for run in runs]
    noted = ["samples per task", *map(str, counts)], ["dtype", *(str(run.conditions["dtype"]) for run in runs)]
    return markdown(["score (%) at tokens", *names], [*rows, *noted])


def equal_bytes_tables(file: Path, model: str) -> str:
    """Return a table per length and way of asking a model, and one of presses that were stopped after few samples."""
    rows: list[Row] = json.loads(file.read_text())["scores"]
    settings = dict.fromkeys((row["tokens"], row["question"]) for row in rows if row["model"] == model)
    tables = []
    for tokens, question in settings:
        found = [row for row in rows if (row["model"], row["tokens"], row["question"]) == (model, tokens, question)]
        asked = "question unseen" if question == "unseen" else "question seen with the context"
        tasks = _tasks(found)
        most = max(row["samples"] for row in found)
        stopped = {row["press"] for row in found if 2 * row["samples"] < most}
        compared = [row for row in found if row["press"] not in stopped]
        tables.append(f"{tokens:,} tokens, {asked}, {_named(tasks)}:\n\n{table(compared)}")
        if stopped:
            others = [row for row in found if row["press"] in stopped]
            tables.append(f"Stopped after few samples:\n\n{table(others)}")
    return "\n".join(tables)


def _tasks(rows: Iterable[Row]) -> list[str]:
    """Return the tasks of the press that has most of them."""
    return max((list(row["tasks"]) for row in rows), key=len)


def _named(tasks: Iterable[str]) -> str:
    return ", ".join(f"`{task}`" for task in tasks)


def table(rows: Sequence[Row]) -> str:
    """Return a row per press, a column per share of the bytes that it was asked to leave.

    A cell reads `83.3 ± 5.0 at 25.1%`: mean score, half the width of its interval if there is one, bytes as measured.
    The best of a column is bold, of those at most a tenth above its bytes.
    """
    shares = sorted({row["share"] for row in rows}, reverse=True)
    cells = {(row["press"], row["share"]): row for row in rows}
    best = {share: _best(rows, share) for share in shares if share < 1}
    presses = sorted({row["press"] for row in rows}, key=lambda press: _order(rows, press))
    body = [
        [press, _samples(rows, press), *(_cell(cells.get((press, share)), best.get(share)) for share in shares)]
        for press in presses
    ]
    columns = ["all" if share == 1 else f"{100 * share:.4g}%" for share in shares]
    return markdown(["score (%) at KV bytes", "samples", *columns], body)


def _order(rows: Sequence[Row], press: str) -> tuple[Any, ...]:
    if press in _FIRST:
        return 0, _FIRST.index(press)
    others = [row for row in rows if row["press"] not in _FIRST]
    measured = [{row["share"] for row in others if row["press"] == each} for each in {row["press"] for row in others}]
    common = set.intersection(*measured)
    return 1, -sum(row["score"] for row in others if row["press"] == press and row["share"] in common), press


def _samples(rows: Sequence[Row], press: str) -> str:
    counts = [row["samples"] for row in rows if row["press"] == press]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _is_within(row: Row) -> bool:
    return bool(row["kv_share"] <= (1 + TOLERANCE) * row["share"])


def _best(rows: Sequence[Row], share: float) -> float:
    return max((round(row["score"], 1) for row in rows if row["share"] == share and _is_within(row)), default=-1.0)


def _cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return NOTHING
    interval = f" ± {(row['high'] - row['low']) / 2:.1f}" if "low" in row else ""
    text = f"{row['score']:.1f}{interval} at {row['kv_share']:.1%}"
    return Bold(text) if best is not None and _is_within(row) and round(row["score"], 1) == best else text


def main() -> None:
    """Print the tables of committed results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with ceiling/ and presses-at-equal-bytes.json")
    results = parser.parse_args().results
    print(ceiling_table(results / "ceiling"))
    for model in MODELS:
        print(f"{model}:\n\n{equal_bytes_tables(results / FILE, model)}")


if __name__ == "__main__":
    main()
