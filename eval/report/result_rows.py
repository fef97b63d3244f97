"""Write rows of results as JSON, one per line, with where they come from, and show them as tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console

from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.provenance import provenance
from pikv_hf.reports.fitting_table import FittingTable

#: Columns of the tables where the terminal does not say.
WIDTH = 140

Row = Mapping[str, Any]


def write_rows(file: Path, about: Row, tables: Mapping[str, Sequence[Row]]) -> None:
    """Write a JSON object: machine, versions and command, what was measured, and lists of rows.

    Parameters
    ----------
    file : Path
        Its folder is made if it is missing.
    about : mapping
        Further entries, such as the metric.
    tables : mapping
        From names to rows of JSON values; numbers are rounded to four significant digits, absent values left out.
    """
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in {**provenance(), **about}.items()]
    for name, rows in tables.items():
        body = ",\n".join("    " + json.dumps({k: _short(v) for k, v in row.items() if v is not None}) for row in rows)
        lines.append(f"  {json.dumps(name)}: [\n{body}\n  ]")
    write_file(file, "{\n" + ",\n".join(lines) + "\n}\n")


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    if not console.is_terminal:
        console.width = WIDTH
    table = FittingTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def percent(error: float) -> str:
    """Return a share in percent, with three digits of those that matter."""
    return f"{100 * error:.3g}" if error < 9.995 else f"{100 * error:,.0f}"
