"""Show what :mod:`pikv_hf.eval.studies.codecs.quantisation_schemes_study` measured as tables in the terminal."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from ...report.result_rows import Row, percent, show_table
from .attention_error import root_mean_square
from .sample_kv import GEOMETRIES

#: The column that random models share; a trained one has its own.
RANDOM = "random"


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One row of the results.

    Attributes
    ----------
    data, case : str
        Model, and what was done to its keys.
    part : str
        What is coded: `"keys"`, `"values"` or `"both"`.
    scheme : str
        By name.
    bits : int
        Per code.
    error : float
        As in :data:`~pikv_hf.eval.studies.codecs.attention_error.METRIC`.
    relative : float, optional
        Of a difficult case: the error over that of the same scheme and bits on ordinary keys.
    moved, unpacked : float, optional
        With the guard: share of pages, of keys and of values, stored in a wider kind, and share of those that no
        integer kind held.
    largest : float, optional
        With the guard: the largest ratio of a page and head.
    """

    data: str
    case: str
    part: str
    scheme: str
    bits: int
    error: float
    relative: float | None = None
    moved: float | None = None
    unpacked: float | None = None
    largest: float | None = None


def show(console: Console, rows: Sequence[Measured], sizes: Sequence[Row]) -> None:
    """Print errors of ordinary and difficult keys, and what the guard moved.

    Parameters
    ----------
    console : Console
        Where to.
    rows : sequence of Measured
        All results.
    sizes : sequence of mapping
        Of :func:`~pikv_hf.eval.studies.codecs.quantisation_schemes_study.page_sizes`.
    """
    for part in ("keys", "values", "both"):
        _show_part(console, part, [row for row in rows if row.part == part and row.case == "ordinary"], sizes)
    hard = [row for row in rows if row.case != "ordinary"]
    if hard:
        _show_difficult(console, [row for row in hard if row.bits == 4])
    _show_guard(console, [row for row in rows if row.moved is not None and row.part != "both"])


def _show_part(console: Console, part: str, rows: Sequence[Measured], sizes: Sequence[Row]) -> None:
    """Print the errors of every scheme beside its bytes."""
    lines, columns = [], list(dict.fromkeys(_group(row.data) for row in rows))
    for name in dict.fromkeys(row.scheme for row in rows):
        own = [row for row in rows if row.scheme == name]
        widths = list(dict.fromkeys(row.bits for row in own))
        shares = {row["bits"]: f"{row['share']:.3f}" for row in sizes if (row["part"], row["scheme"]) == (part, name)}
        cells = [[_mean(own, where, bits) for bits in widths] for where in columns]
        lines.append([name, "/".join(map(str, widths)), *map("  ".join, [shares.values(), *cells])])
    what = "keys and values" if part == "both" else f"{part} only"
    size = "bytes with metadata" if part == "both" else "bytes"
    title = f"Error of attention in percent, {what}; {size} as a share of bf16 (D = 128); random: four random models"
    show_table(console, title, ["scheme", "bits", "bytes", *columns], lines)


def _mean(rows: Sequence[Measured], where: str, bits: int) -> str:
    """Return the root mean square over the models that `where` names, a dash without any."""
    found = [row.error for row in rows if row.bits == bits and _group(row.data) == where]
    return percent(root_mean_square(found)) if found else "-"


def _group(data: str) -> str:
    return RANDOM if data in GEOMETRIES else data


def _show_difficult(console: Console, rows: Sequence[Measured]) -> None:
    """Print, of the bundled model and of the worst model, errors over those of ordinary keys."""
    cases = list(dict.fromkeys(row.case for row in rows))
    lines = []
    for name in dict.fromkeys(row.scheme for row in rows):
        cells = []
        for case in cases:
            found = {row.data: row.relative or 0.0 for row in rows if (row.scheme, row.case) == (name, case)}
            cells.append(f"{found['reference']:.2f} / {max(found.values()):.2f}")
        lines.append([name, *cells])
    title = "Difficult keys, 4 bits: error over that of ordinary keys, bundled / worst model"
    show_table(console, title, ["scheme", *cases], lines)


def _show_guard(console: Console, rows: Sequence[Measured]) -> None:
    """Print the share of pages that the guard moved, where it moved any."""
    lines = [
        [f"{row.data}, {row.case}, {row.part}", row.scheme, str(row.bits)]
        + [percent(number or 0.0) for number in (row.moved, row.unpacked, row.error)]
        for row in rows
        if row.moved
    ]
    columns = ["data", "scheme", "bits", "pages moved", "not packed", "error"]
    show_table(console, "Pages that the guard stores in a wider kind, in percent", columns, lines)
