"""Keep the results of one run in a folder: complete or not there, and resumable in between.

Layout of kvpress's evaluation, `predictions.csv`, `metrics.json` and `config.yaml`, with `summary.json` written last:
a folder with a summary is complete. Until then every finished sample is a line of a `partial-*.jsonl` file, one file
per process. A complete run may have its samples compressed (`pikv_hf.eval.runner.archive`), or not have them any more:
its summary and metrics are all that tables and figures need.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.runner.options_id import fingerprint

PREDICTIONS = "predictions.csv"
#: The same rows, compressed.
ARCHIVED = "predictions.csv.gz"
METRICS = "metrics.json"
CONFIG = "config.yaml"
SUMMARY = "summary.json"

Row = dict[str, Any]


class ResultFolder:
    """Where the results of one run are, or will be.

    Parameters
    ----------
    path : Path
        Of the folder; made when first written to.
    config : Mapping
        All options that the results depend on. Lines that were written under other options are not resumed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = dict(config)
        self._fingerprint = fingerprint(self.config)

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / SUMMARY).exists()

    def partial_rows(self) -> dict[str, Row]:
        """Return the rows of an interrupted run by sample id.

        A line that was cut off in the middle is left out, and so is every file that another configuration wrote.
        """
        rows: dict[str, Row] = {}
        for file in sorted(self.path.glob("partial-*.jsonl")):
            head, *lines = _whole_lines(file) or [{}]
            if head.get("fingerprint") == self._fingerprint:
                rows.update({row["id"]: row for row in lines})
        return rows

    def append(self, rows: Iterable[Row], process: int = 0) -> None:
        """Keep finished samples, safe from whatever happens to the process afterwards."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"partial-{process}.jsonl"
        whole = _whole_lines(file) if file.exists() else []
        fresh = not whole or whole[0].get("fingerprint") != self._fingerprint
        with file.open("w" if fresh else "r+", encoding="utf-8") as stream:
            if fresh:
                stream.write(json.dumps({"fingerprint": self._fingerprint}) + "\n")
            else:
                # What an interrupted write left behind the last whole line is overwritten.
                stream.seek(_whole_length(file))
                stream.truncate()
            try:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError as error:
                # A write to a full disk names no file.
                error.filename = str(file)
                raise

    def finish(self, rows: list[Row], metrics: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the four files, the summary last, and remove the partial ones."""
        write_file(self.path / PREDICTIONS, pd.DataFrame(rows).to_csv(index=False))
        write_file(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")
        write_file(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        write_file(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")
        for file in self.path.glob("partial-*.jsonl"):
            file.unlink()

    def clear(self) -> None:
        """Forget what an earlier run left here; nothing but a run's own files is removed."""
        for name in (SUMMARY, PREDICTIONS, ARCHIVED, METRICS, CONFIG):
            (self.path / name).unlink(missing_ok=True)
        for file in self.path.glob("partial-*.jsonl"):
            file.unlink()

    def read(self) -> tuple[pd.DataFrame | None, dict[str, Any], dict[str, Any]]:
        """Return rows, metrics and summary of a complete run; None for rows that were not kept.

        Raises
        ------
        InputError
            If the run is not complete, is damaged, or was made with other options.
        """
        if not self.finished:
            raise InputError(f"{self.path} has no {SUMMARY}: the run is not complete")
        with user_input(f"cannot read the results in {self.path}"):
            return self._read()

    def _read(self) -> tuple[pd.DataFrame | None, dict[str, Any], dict[str, Any]]:
        config, metrics, summary = (_mapping(self.path / name) for name in (CONFIG, METRICS, SUMMARY))
        if fingerprint(config) != self._fingerprint:
            changed = {key for key in {*config, *self.config} if config.get(key) != self.config.get(key)}
            details = "; ".join(
                f"{key} {config.get(key)!r} there, {self.config.get(key)!r} here" for key in sorted(changed)
            )
            raise InputError(f"{self.path} was made with other options: {details}")
        file = samples_file(self.path)
        rows = None if file is None else pd.read_csv(file, keep_default_na=False, na_values=[""])
        return rows, metrics, summary


def _mapping(file: Path) -> dict[str, Any]:
    """Read a file of options or figures; JSON is YAML too, but an order of magnitude slower to read so."""
    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: found {type(content).__name__}, expected a mapping")
    return content


def samples_file(folder: Path) -> Path | None:
    """Return the file with a run's samples, plain or compressed; None where they were not kept."""
    files = (folder / name for name in (PREDICTIONS, ARCHIVED))
    return next((file for file in files if file.is_file()), None)


def _whole_lines(file: Path) -> list[Row]:
    text = file.read_bytes()[: _whole_length(file)].decode("utf-8", errors="replace")
    return [row for line in text.splitlines() if isinstance(row := _parsed(line), dict)]


def _parsed(line: str) -> Any:
    """Return a line's value, None for one that something else has damaged: it is measured anew."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _whole_length(file: Path) -> int:
    """Return the bytes up to and including the last newline: what is behind it was cut off."""
    return file.read_bytes().rfind(b"\n") + 1
