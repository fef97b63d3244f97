"""Print the tables of presses at equal bytes for docs/presses.md, of the committed results."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.report.budgets import TOLERANCE
from pikv_hf.eval.report.table import NOTHING, Bold, markdown
from pikv_hf.eval.studies.presses.equal_bytes_rows import COMPARED
from pikv_hf.eval.studies.presses.equal_bytes_sample import FULL, INT4

Row = dict[str, Any]

#: Rows that come first; the others by their mean score.
_FIRST = (FULL, INT4, COMPARED)


def equal_bytes_tables(file: Path) -> str:
    """Return a table per length and way of asking, each under a line that says what it is of."""
    rows: list[Row] = json.loads(file.read_text())["scores"]
    settings = dict.fromkeys((row["tokens"], row["question"]) for row in rows)
    tables = []
    for tokens, question in settings:
        found = [row for row in rows if (row["tokens"], row["question"]) == (tokens, question)]
        asked = "question unseen" if question == "unseen" else "question seen with the context"
        tables.append(f"{tokens:,} tokens, {asked}:\n\n{table(found)}")
    return "\n".join(tables)


def table(rows: Sequence[Row]) -> str:
    """Return a row per press, a column per share of the bytes that it was asked to leave.

    A cell reads `83.3 ± 5.0 at 25.1%`: mean score, half the width of its interval, bytes as measured. The best of a
    column is bold, of those at most a tenth above its bytes.
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
    scores = [row["score"] for row in rows if row["press"] == press]
    return 1, -sum(scores) / len(scores), press


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
    text = f"{row['score']:.1f} ± {(row['high'] - row['low']) / 2:.1f} at {row['kv_share']:.1%}"
    return Bold(text) if best is not None and _is_within(row) and round(row["score"], 1) == best else text


def main() -> None:
    """Print the tables of a file of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what equal_bytes_study has written")
    print(equal_bytes_tables(parser.parse_args().file), end="")


if __name__ == "__main__":
    main()
