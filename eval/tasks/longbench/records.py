"""Read LongBench's data: one JSON object per line, in a folder or in the archive on the Hub."""

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from pikv_hf.eval.hub import impatient_hub
from pikv_hf.eval.tasks.longbench.sets import LongBenchSet

REPOSITORY = "THUDM/LongBench"
ARCHIVE = "data.zip"

_TEXTS = ("input", "context", "dataset", "language", "_id")
_LISTS = ("answers", "all_classes")
_KEYS = (*_TEXTS, *_LISTS, "length")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of LongBench's data; further keys of a line are ignored.

    Attributes
    ----------
    input : str
        The question, or empty.
    context : str
        The long text.
    answers : tuple of str
        Right answers, at least one of them not blank.
    length : int
        Of context, input and answers together: characters in Chinese, words otherwise.
    language : str
        `en`, `zh` or a programming language.
    all_classes : tuple of str, optional
        Labels of a classification task.
    id : str
        The data's own `_id`.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    language: str
    all_classes: tuple[str, ...] | None
    id: str


def read_records(
    entry: LongBenchSet, data_dir: Path | None = None, *, e: bool = False, limit: int | None = None
) -> list[Record]:
    """Read the first `limit` samples of a set, or all.

    Parameters
    ----------
    entry : LongBenchSet
        The set.
    data_dir : Path, optional
        Folder with `<set>.jsonl`, or `<set>_e.jsonl` for LongBench-E; by default the archive is taken from the Hub.
        (`datasets.load_dataset` cannot: the Hub's repository is a loading script, which datasets 4 no longer runs.)
    e : bool
        LongBench-E.
    limit : int, optional
        At least 1.

    Raises
    ------
    FileNotFoundError
        If the file is missing, or the archive can neither be downloaded nor found in the Hub's cache.
    ValueError
        For a line that is no sample of this set, with file and line number, and for a file without lines.
    """
    name = f"{entry.name}_e.jsonl" if e else f"{entry.name}.jsonl"
    with _open_archive(name) if data_dir is None else _open_folder(data_dir, name) as (source, lines):
        numbered = islice(enumerate(lines, start=1), limit)
        records = [parse_line(line, entry, f"{source}, line {number}") for number, line in numbered]
    if not records:
        raise ValueError(f"{source}: expected one sample per line, got an empty file")
    return records


@contextmanager
def _open_folder(folder: Path, name: str) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Open a file of a folder; yield its name for messages and its lines."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no {name} in {folder}: expected a folder with LongBench's .jsonl files")
    with (folder / name).open("rb") as lines:
        yield str(folder / name), lines


@contextmanager
def _open_archive(name: str) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Open a file of the Hub's archive; yield its name for messages and its lines."""
    with zipfile.ZipFile(download_archive()) as archive:
        members = [member for member in archive.namelist() if Path(member).name == name]
        if len(members) != 1:
            raise FileNotFoundError(f"expected one {name} in {ARCHIVE} of {REPOSITORY}, found {len(members)}")
        with archive.open(members[0]) as lines:
            yield f"{ARCHIVE}/{members[0]}", lines


def download_archive() -> Path:
    """Return the Hub's archive of all sets from the local cache, after downloading it if need be.

    Raises
    ------
    FileNotFoundError
        If it is neither there nor can be downloaded.
    """
    try:
        with impatient_hub():
            return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except OSError as error:
        raise FileNotFoundError(
            f"cannot get {ARCHIVE} of {REPOSITORY} from the Hub ({type(error).__name__}): unpack it elsewhere and give "
            "the folder of its .jsonl files as --data-dir"
        ) from error


def parse_line(line: bytes, entry: LongBenchSet, place: str) -> Record:
    """Check one line and turn it into a record.

    Raises
    ------
    ValueError
        Naming `place` and what was found and expected.
    """
    fields = _decode(line, place)
    if missing := [key for key in _KEYS if key not in fields]:
        raise ValueError(f"{place}: expected the keys {', '.join(_KEYS)}, missing {', '.join(missing)}")
    _check_types(fields, place)
    _check_values(fields, entry, place)
    return Record(
        input=fields["input"],
        context=fields["context"],
        answers=tuple(fields["answers"]),
        length=fields["length"],
        language=fields["language"],
        all_classes=None if fields["all_classes"] is None else tuple(fields["all_classes"]),
        id=fields["_id"],
    )


def _decode(line: bytes, place: str) -> dict[str, Any]:
    """Return the line's JSON object."""
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: expected UTF-8, got byte 0x{line[error.start]:02x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected a JSON object, {error.msg} at character {error.pos}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _check_types(fields: dict[str, Any], place: str) -> None:
    """Refuse a value of the wrong type."""
    for key in _TEXTS:
        if not isinstance(fields[key], str):
            raise ValueError(f"{place}: {key} must be a text, got {fields[key]!r}")
    for key in _LISTS:
        if not _is_text_list(fields[key]) and not (key == "all_classes" and fields[key] is None):
            raise ValueError(f"{place}: {key} must be a list of texts, got {fields[key]!r}")
    # bool is a kind of int to Python.
    if type(fields["length"]) is not int or fields["length"] < 0:
        raise ValueError(f"{place}: length must be a whole number, got {fields['length']!r}")


def _check_values(fields: dict[str, Any], entry: LongBenchSet, place: str) -> None:
    """Refuse a sample of another set, and one that cannot be scored."""
    if fields["dataset"] not in (entry.name, f"{entry.name}_e"):
        raise ValueError(f"{place}: expected dataset {entry.name!r}, got {fields['dataset']!r}")
    if not any(answer.strip() for answer in fields["answers"]):
        raise ValueError(f"{place}: expected at least one answer that is not blank, got {fields['answers']!r}")
    if entry.metric == "classification" and not fields["all_classes"]:
        raise ValueError(f"{place}: {entry.name} needs all_classes, got {fields['all_classes']!r}")


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
