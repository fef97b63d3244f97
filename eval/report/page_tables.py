"""Fill the tables of the HTML page with cells of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from pikv_hf.eval.report.groups import Entry, Group
from pikv_hf.eval.report.summary_file import Provenance
from pikv_hf.eval.report.table import NOTHING, header_cells, interval, percent, row_cells, times
from pikv_hf.reports.memory_report import format_bytes

#: Columns of the page's table that `table.md` does not have; the share is of `DynamicCache` in the model's own dtype.
_MEASURED = (
    "prefill speed",
    "KV bytes after prefill",
    "KV share in own dtype",
    "prefill tokens/s",
    "decode tokens/s",
    "peak memory",
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names the rows."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Runs that were made by the same code on the same machine.

    Attributes
    ----------
    commit, machine, versions : str
        What they have in common.
    runs : tuple of (str, str, str, str)
        Label, folder, date and command of each.
    """

    commit: str
    machine: str
    versions: str
    runs: tuple[tuple[str, str, str, str], ...]


def main_table(group: Group) -> Table:
    """Return what `table.md` shows, and bytes and speeds as they were measured."""
    header = (*header_cells(group.measure), *_MEASURED)
    return Table(header, tuple(_main_row(group, entry) for entry in group.entries))


def tasks_table(group: Group) -> Table:
    """Return scores with their intervals, one row per task and one column per run."""
    header = ("task", "metric", *(entry.label for entry in group.entries))
    return Table(header, tuple(_task_row(group, task) for task in group.tasks))


def origins(entries: Sequence[Entry]) -> list[Origin]:
    """Return where the runs come from, those of the same code and machine together."""
    grouped: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(_circumstances(entry.summary.provenance), []).append(entry)
    return [Origin(*common, tuple(map(_origin_row, members))) for common, members in grouped.items()]


def _main_row(group: Group, entry: Entry) -> tuple[str, ...]:
    cost = entry.summary.cost
    peak = cost.cuda_peak_bytes or cost.peak_memory_bytes
    return (
        *row_cells(group, entry),
        times(group.speed_ratio(entry, "prefill_tokens_per_s")),
        _bytes(cost.kv_bytes_prefill),
        percent(cost.kv_share_prefill_dtype),
        _count(cost.prefill_tokens_per_s),
        _count(cost.decode_tokens_per_s),
        _bytes(peak),
    )


def _task_row(group: Group, task: str) -> tuple[str, ...]:
    scores = [entry.summary.tasks.get(task) for entry in group.entries]
    metrics = dict.fromkeys(score.metric for score in scores if score is not None)
    cells = [NOTHING if score is None else interval(score.estimate, group.measure) for score in scores]
    return (task, ", ".join(metrics), *cells)


def _circumstances(provenance: Provenance) -> tuple[str, str, str]:
    machine = [f"{name} {value}" for name, value in provenance.machine.items() if value is not None]
    versions = [f"{name} {value}" for name, value in provenance.versions.items() if value is not None]
    return provenance.commit or "unknown", ", ".join(machine), ", ".join(versions)


def _origin_row(entry: Entry) -> tuple[str, str, str, str]:
    provenance = entry.summary.provenance
    return entry.label, entry.run.folder.name, provenance.date, provenance.command


def _bytes(count: float | None) -> str:
    return NOTHING if count is None else format_bytes(count)


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
