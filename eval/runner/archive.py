"""Compress the samples of finished runs, for results under version control: `python -m pikv_hf.eval.runner.archive`.

Seconds and peaks of each sample go, which are most of the bytes: nothing reads them, and the summary has their means.
The same rows give the same bytes, so that a run that only was read again changes no file.
"""

import argparse
import gzip
import io
from pathlib import Path

import pandas as pd

from pikv_hf.eval.runner.folder import ARCHIVED, PREDICTIONS, SUMMARY

#: Columns that are left out.
MEASURED = (
    "prefill_seconds",
    "decode_seconds",
    "decode_steps",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "cuda_peak_bytes",
)


def archive(folder: Path) -> int:
    """Replace `predictions.csv` by `predictions.csv.gz` in all finished runs below a folder, and count them.

    Texts and numbers are kept as they were written. A run that is not finished is left alone.
    """
    finished = [file for file in sorted(folder.rglob(PREDICTIONS)) if file.with_name(SUMMARY).is_file()]
    for file in finished:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")
        _compress(rows.drop(columns=list(MEASURED), errors="ignore"), file.with_name(ARCHIVED))
        file.unlink()
    return len(finished)


def _compress(rows: pd.DataFrame, file: Path) -> None:
    content = io.BytesIO()
    # Neither a name nor a time is written into the file.
    with gzip.GzipFile(fileobj=content, filename="", mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(rows.to_csv(index=False).encode("utf-8"))
    file.write_bytes(content.getvalue())


def main() -> None:
    """Archive the folders of the command line."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.runner.archive", description=archive.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with runs of pikv eval below them")
    for folder in parser.parse_args().folders:
        print(f"{folder}: {archive(folder)} runs archived")


if __name__ == "__main__":
    main()
