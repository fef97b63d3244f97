"""Pick a few wrong answers for reading."""

import json
from dataclasses import dataclass

import pandas as pd

from pikv_hf.eval.report.runs import Run

#: Answers shown of a run, and of all runs of a page together, but for one of each run.
EXAMPLES, EXAMPLES_OF_PAGE = 4, 160
#: Characters shown of a question, a list of references and an answer.
LIMIT = 240


@dataclass(frozen=True, slots=True)
class Example:
    """One answer below full score; all texts are cut to `LIMIT` characters and are data, not markup."""

    id: str
    task: str
    score: float
    question: str
    references: str
    answer: str


@dataclass(frozen=True, slots=True)
class Examples:
    """How many answers of a run are below full score, and some of them."""

    wrong: int
    shown: tuple[Example, ...]


def examples_each(runs: int) -> int:
    """Return how many answers a page of so many runs shows of each."""
    return max(1, min(EXAMPLES, EXAMPLES_OF_PAGE // runs))


def wrong_answers(run: Run, most: int = EXAMPLES) -> Examples | None:
    """Return the worst answer of each task, the worst tasks first; None if the run has no answers or kept none.

    The choice depends on the rows alone: ties go to the earlier row.
    """
    if run.samples is None or not run.summary.measure.higher_is_better:
        return None
    wrong = run.rows[run.rows["score"] < 1].sort_values("score", kind="stable")
    first = wrong.drop_duplicates("task").head(most)
    return Examples(len(wrong), tuple(_example(row) for _, row in first.iterrows()))


def shorten(text: str, limit: int = LIMIT) -> str:
    """Return text of at most `limit` characters; a cut one says how many are missing."""
    return text if len(text) <= limit else f"{text[:limit]} … (+{len(text) - limit:,} characters)"


def _example(row: pd.Series) -> Example:
    return Example(
        id=row["id"],
        task=row["task"],
        score=100 * float(row["score"]),
        question=shorten(_readable(f"{row['question'].strip()} {row['answer_prefix'].strip()}".strip())),
        references=shorten(_readable(_references(row["answer"]))),
        answer=shorten(_readable(row["predicted_answer"])),
    )


def _references(answer: str) -> str:
    """References side by side; kvpress's own files have another notation than JSON, which is shown as it is."""
    try:
        references = json.loads(answer)
    except ValueError:
        return answer
    return " | ".join(map(str, references)) if isinstance(references, list) else answer


def _readable(text: str) -> str:
    """Text with invisible characters but line breaks made visible; a page cannot hold some of them."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text.replace("\r\n", "\n"))
