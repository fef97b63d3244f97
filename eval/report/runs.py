"""Find and read the result folders of `pikv eval`."""

import gzip
import os
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report.summary_file import Summary, read_summary
from pikv_hf.eval.runner.folder import ARCHIVED, PREDICTIONS, SUMMARY, samples_file

#: Columns of `predictions.csv` that reports and comparisons read; a perplexity run asks nothing and lacks the second.
COLUMNS = ("id", "task", "length", "score")
ANSWER_COLUMNS = ("question", "answer_prefix", "answer", "predicted_answer")
#: Only needle runs have it, or have it filled.
DEPTH = "depth"
#: What reading a compressed file raises that was cut off or changed.
_BROKEN_ARCHIVE = (EOFError, gzip.BadGzipFile, zlib.error)
#: Any of these shows that a run was begun.
_TRACES = (PREDICTIONS, ARCHIVED, "metrics.json", "config.yaml", "partial-*.jsonl")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One finished run.

    Attributes
    ----------
    folder : Path
        Where it lies.
    summary : Summary
        Its `summary.json`.
    samples : pandas.DataFrame or None
        Its `predictions.csv`, plain or compressed, one row per sample; None where the folder has neither. Texts are
        strings exactly as written (an answer `NA` is text); `score`, `length` and `depth` are float64.
    """

    folder: Path
    summary: Summary
    samples: pd.DataFrame | None

    @property
    def rows(self) -> pd.DataFrame:
        """The samples, for what cannot do without them.

        Raises
        ------
        InputError
            If they were not kept.
        """
        if self.samples is None:
            raise InputError(
                f"{self.folder / PREDICTIONS} is missing, and so is {ARCHIVED}: the samples of this run were not kept, "
                "run it again with --overwrite"
            )
        return self.samples

    @property
    def has_depths(self) -> bool:
        """Whether this is a needle run whose samples were kept."""
        return self.samples is not None and DEPTH in self.samples.columns


@dataclass(frozen=True, slots=True)
class Folders:
    """Result folders below some paths: the finished ones, and those with results but without `summary.json`."""

    finished: tuple[Path, ...]
    unfinished: tuple[Path, ...]


def find_folders(paths: Iterable[Path | str]) -> Folders:
    """Search paths and all folders below them.

    Raises
    ------
    FileNotFoundError
        If a path is not a folder.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder, expected one with results of pikv eval")
        for folder in _folders(path):
            if (folder / SUMMARY).is_file():
                finished.setdefault(folder.resolve(), folder)
            elif any(file.is_file() for name in _TRACES for file in folder.glob(name)):
                unfinished.setdefault(folder.resolve(), folder)
    return Folders(tuple(finished.values()), tuple(unfinished.values()))


def load_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read all finished runs in or below some folders.

    Parameters
    ----------
    paths : iterable of path
        Result folders or parents of them; a run that is found twice is read once.

    Returns
    -------
    list of Run
        In the order of `paths`, then by folder name.

    Warns
    -----
    UserWarning
        For each folder that has results but no `summary.json`: its run did not finish, and it is not read.

    Raises
    ------
    FileNotFoundError
        If a path is not a folder.
    InputError
        If there is no finished run, or a file cannot be used: the message names the file and the field or row.
    """
    paths = [Path(path) for path in paths]
    folders = find_folders(paths)
    for folder in folders.unfinished:
        warnings.warn(f"{folder}: no {SUMMARY}, the run did not finish; not read", stacklevel=2)
    if not folders.finished:
        where = ", ".join(map(str, paths)) or "no folder"
        raise InputError(f"no finished run in {where}: expected {SUMMARY} in it or below")
    return [read_run(folder) for folder in folders.finished]


def read_run(folder: Path) -> Run:
    """Read one result folder and check that its files agree.

    Raises
    ------
    InputError
        If a file is broken, or the number of rows is not the summary's.
    """
    summary, path = read_summary(folder / SUMMARY), samples_file(folder)
    if path is None:
        return Run(folder, summary, None)
    rows = read_rows(path, answers=summary.measure.name != "perplexity")
    if len(rows) != summary.samples:
        raise InputError(f"{path}: {len(rows)} rows, but {SUMMARY} counts {summary.samples} samples")
    missing = sorted(set(rows["task"]) ^ set(summary.tasks))
    if missing:
        raise InputError(f"{path}: task {missing[0]!r} is only in one of {path.name} and {SUMMARY}")
    return Run(folder, summary, rows)


def read_rows(path: Path, answers: bool = True) -> pd.DataFrame:
    """Read one `predictions.csv` or `predictions.csv.gz`.

    Parameters
    ----------
    path : Path
        The file.
    answers : bool
        Whether it must have questions and answers; where it has none, they are empty.

    Raises
    ------
    InputError
        If it is no CSV file, lacks a column, has an id twice, or has a text where a number belongs.
    """
    try:
        # Everything as text first: pandas would turn an answer "NA" or "null" into a missing value.
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, *_BROKEN_ARCHIVE) as error:
        raise InputError(f"{path}: not a CSV file: {str(error).strip().splitlines()[-1]}") from None
    _require_columns(path, rows, (*COLUMNS, *ANSWER_COLUMNS) if answers else COLUMNS)
    _require_unique_ids(path, rows)
    numbers = {name: _numbers(path, rows, name) for name in ("length", "score")}
    rows = rows.assign(**numbers, **{name: "" for name in ANSWER_COLUMNS if name not in rows.columns})
    if DEPTH in rows.columns and (rows[DEPTH] != "").any():
        return rows.assign(**{DEPTH: _numbers(path, rows, DEPTH)})
    return rows.drop(columns=DEPTH, errors="ignore")


def _folders(path: Path) -> list[Path]:
    """The folder and all folders below it, by name; links to folders are not followed."""
    return sorted(Path(folder) for folder, _, _ in os.walk(path))


def _require_columns(path: Path, rows: pd.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in rows.columns]
    if missing:
        raise InputError(f"{path}: column {missing[0]} is missing, found {', '.join(rows.columns)}")


def _require_unique_ids(path: Path, rows: pd.DataFrame) -> None:
    repeated = rows["id"][rows["id"].duplicated()]
    if len(repeated):
        raise InputError(f"{path}: id {repeated.iloc[0]!r} appears more than once")


def _numbers(path: Path, rows: pd.DataFrame, name: str) -> pd.Series:
    numbers = pd.to_numeric(rows[name], errors="coerce").astype("float64")
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        sample, text = rows["id"].iloc[bad[0]], rows[name].iloc[bad[0]]
        raise InputError(f"{path}, row {bad[0] + 1} (id {sample}): {name} is {text!r}, expected a finite number")
    return numbers
