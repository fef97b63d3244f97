"""List every single run for the HTML page: a row of figures, where it comes from, and answers that were wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from pikv_hf.eval.report.examples import Examples, examples_each, wrong_answers
from pikv_hf.eval.report.groups import Entry
from pikv_hf.eval.report.overview import Block, Place, Row
from pikv_hf.eval.report.page_tables import Cell, bounds, budget_name, count, peak_bytes, size
from pikv_hf.eval.report.summary_file import Provenance, one_line
from pikv_hf.eval.report.table import number, percent, times

HEADS = (
    "kept",
    "score",
    "95% interval",
    "KV after prefill",
    "KV at end",
    "KV in own dtype",
    "KV bytes",
    "decode",
    "prefill",
    "decode tokens/s",
    "prefill tokens/s",
    "peak memory",
)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run of the page.

    Attributes
    ----------
    row : Row
        Its method.
    asked : str
        Data set, length and model.
    budget : str
        What its press was asked to keep.
    cells : tuple of Cell
        In the order of `HEADS`.
    origin : str
        Letter of the code and machine that made it, see `Origin`.
    folder, date, command : str
        Where it lies and how it was made.
    samples : int
        Questions.
    wrong : Examples or None
        Answers below full score; None where there are none to show.
    """

    row: Row
    asked: str
    budget: str
    cells: tuple[Cell, ...]
    origin: str
    folder: str
    date: str
    command: str
    samples: int
    wrong: Examples | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Code and machine that made runs: a letter, how many runs, and what they have in common."""

    letter: str
    runs: int
    commit: str
    machine: str
    versions: str


def run_rows(blocks: Sequence[Block]) -> tuple[list[RunRow], list[Origin]]:
    """Return all runs, block by block, model by model, as tables show them, and where they come from."""
    placed = [(block, row, place, row.runs[place]) for block in blocks for index in range(len(block.groups))
              for row in block.rows for place in sorted(row.runs) if place[0] == index]  # fmt: skip
    made = [_circumstances(entry.summary.provenance) for _, _, _, entry in placed]
    letters = {common: _letter(index) for index, common in enumerate(dict.fromkeys(made))}
    examples = examples_each(len(placed))
    rows = [
        _run_row(block, row, place, letters[common], examples)
        for (block, row, place, _), common in zip(placed, made, strict=True)
    ]
    return rows, [Origin(letter, made.count(common), *common) for common, letter in letters.items()]


def _run_row(block: Block, row: Row, place: Place, origin: str, examples: int) -> RunRow:
    entry = row.runs[place]
    provenance = entry.summary.provenance
    return RunRow(
        row=row,
        asked=block.groups[place[0]].title,
        budget=budget_name(place[1]),
        cells=_cells(block, place, entry),
        origin=origin,
        folder=entry.run.folder.name,
        date=provenance.date,
        command=provenance.command,
        samples=entry.summary.samples,
        wrong=wrong_answers(entry.run, examples),
    )


def _cells(block: Block, place: Place, entry: Entry) -> tuple[Cell, ...]:
    group, cost, score = block.groups[place[0]], entry.summary.cost, entry.summary.score
    speeds = [group.speed_ratio(entry, name) for name in ("decode_tokens_per_s", "prefill_tokens_per_s")]
    return (
        Cell(budget_name(place[1]), value=1 - place[1]),
        Cell(number(score.mean, block.measure.unit), value=score.mean),
        Cell(bounds(score, block.measure), value=score.low),
        *(Cell(percent(share), value=share)
          for share in (cost.kv_share_prefill, cost.kv_share_end, cost.kv_share_prefill_dtype)),
        Cell(size(cost.kv_bytes_prefill), value=cost.kv_bytes_prefill),
        *(Cell(times(ratio), value=ratio) for ratio in speeds),
        *(Cell(count(speed), value=speed) for speed in (cost.decode_tokens_per_s, cost.prefill_tokens_per_s)),
        Cell(size(peak_bytes(entry)), value=peak_bytes(entry)),
    )  # fmt: skip


def _circumstances(provenance: Provenance) -> tuple[str, str, str]:
    known = [[f"{name} {value}" for name, value in each.items() if value is not None]
             for each in (provenance.machine, provenance.versions)]  # fmt: skip
    machine, versions = (one_line(", ".join(each)) for each in known)
    return provenance.commit or "unknown", machine, versions


def _letter(index: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    return f"{chr(ord('A') + index % 26)}{index // 26 or ''}"
