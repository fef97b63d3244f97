"""Read SCBench's data in its public schema: a context, and turns with an input and an answer each."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pikv_hf.eval.hub import impatient_hub

REPOSITORY = "microsoft/SCBench"
BUNDLED = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question about a context.

    Attributes
    ----------
    input : str
        The question.
    answers : tuple of str
        Right ones, at least one.
    options : tuple of str
        What the question lets choose from; empty if it is open.
    """

    input: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A context and its turns.

    Attributes
    ----------
    id : str
        The data's own.
    context : str
        What is read first.
    turns : tuple of Turn
        In their order.
    """

    id: str
    context: str
    turns: tuple[Turn, ...]


def read_records(task: str, data_dir: Path | None, limit: int | None = None) -> list[Record]:
    """Read the first `limit` records of a task, or all.

    Parameters
    ----------
    task : str
        Such as `scbench_kv`.
    data_dir : Path, optional
        Folder with `<task>.jsonl` or `<task>/*.parquet`; by default the Hub.
    limit : int, optional
        At least 1.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or the Hub has none.
    ValueError
        For a line that is no record, with where it is, and for none at all.
    """
    numbered = enumerate(_hub(task) if data_dir is None else _folder(task, data_dir), start=1)
    records = [record_of(fields, f"{task}, record {number}") for number, fields in islice(numbered, limit)]
    if not records:
        raise ValueError(f"{task}: expected at least one record, got none")
    return records


def _folder(task: str, folder: Path) -> Iterable[Any]:
    lines, tables = folder / f"{task}.jsonl", sorted(folder.glob(f"{task}/*.parquet"))
    if lines.is_file():
        return _lines(lines)
    if tables:
        return _table("parquet", data_files=[str(table) for table in tables], split="train")
    raise FileNotFoundError(f"no {task}.jsonl and no {task}/*.parquet in {folder}")


def _lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: expected a JSON object, {error.msg}") from None


def _hub(task: str) -> Iterable[Any]:
    with impatient_hub():
        try:
            return _table(REPOSITORY, task, split="test")
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"cannot get {task} of {REPOSITORY} from the Hub ({type(error).__name__}): give a folder as --data-dir"
            ) from error


def _table(*names: str, **options: Any) -> Iterable[Any]:
    from datasets import load_dataset

    table: Iterable[Any] = load_dataset(*names, **options)
    return table


def record_of(fields: Any, place: str) -> Record:
    """Check one record; raise `ValueError` naming `place` and what was found."""
    if not isinstance(fields, dict) or not {"context", "multi_turns"} <= fields.keys():
        raise ValueError(f"{place}: expected an object with context and multi_turns, got {str(fields)[:80]}")
    context, turns = fields["context"], fields["multi_turns"]
    if isinstance(context, list) and all(isinstance(each, int) for each in context):
        # Of a task about numbers.
        context = str(context)
    if not isinstance(context, str) or not isinstance(turns, list) or not turns:
        raise ValueError(
            f"{place}: expected a text and a list of turns, got {type(context).__name__} and {turns!r:.80}"
        )
    return Record(str(fields.get("id", place)), context, tuple(_turn(turn, place) for turn in turns))


def _turn(turn: Any, place: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("input"), str) or turn.get("answer") is None:
        raise ValueError(f"{place}: expected a turn with input and answer, got {str(turn)[:80]}")
    answer = turn["answer"]
    answers = tuple(map(str, answer if isinstance(answer, list) else [answer]))
    if not any(each.strip() for each in answers):
        raise ValueError(f"{place}: expected an answer that is not blank, got {answer!r}")
    return Turn(turn["input"], answers, tuple(map(str, turn.get("options") or ())))
