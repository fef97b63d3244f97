"""Fill the tables of the HTML page with cells of text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pikv_hf.eval.report.groups import Entry, Group
from pikv_hf.eval.report.overview import Block, Place, Row, shown
from pikv_hf.eval.report.runs import DEPTH
from pikv_hf.eval.report.summary_file import Estimate, Measure
from pikv_hf.eval.report.table import NOTHING, measure_name, number, percent, times
from pikv_hf.reports.memory_report import format_bytes

MEAN = "mean"
#: Speeds of `Cost` and what they are called.
SPEEDS = {"decode_tokens_per_s": "decoding", "prefill_tokens_per_s": "prefill"}
#: Behind a score at more bytes than were asked for.
OVER = "†"
_SHARES = {"kv_share_prefill": "after prefill", "kv_share_end": "after the answer"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its text, small text below, the class of its look, and the number to sort by."""

    text: str = NOTHING
    small: str = ""
    look: str = ""
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column: its name and small text below."""

    name: str
    small: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with a row per method.

    Attributes
    ----------
    name : str
        What it shows, for those who do not see it.
    spans : tuple of (str, int)
        Names over so many columns each.
    columns : tuple of Column
        Their heads.
    rows : tuple of (int, Row, tuple of Cell)
        Number and method of each row, and its cells.
    """

    name: str
    spans: tuple[tuple[str, int], ...]
    columns: tuple[Column, ...]
    rows: tuple[tuple[int, Row, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True)
class Needles:
    """Scores of one run by depth of the needle, a row each, and length of the context."""

    label: str
    lengths: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def budget_name(ratio: float) -> str:
    """Return what a column of runs is called: the share of the tokens that presses were asked to keep."""
    return f"{100 * (1 - ratio):.4g}%" if ratio else "all"


def budget_grid(block: Block) -> Grid:
    """Return the scores of all runs with their intervals, the best of each budget marked."""
    if not block.has_budgets:
        return _cache_grid(block)
    best = {place: block.best(place) for place in block.places}
    columns = [Column(budget_name(ratio), _held(block, (index, ratio))) for index, ratio in block.places]

    def cells(row: Row) -> list[Cell]:
        return [_score(row, place, best[place], block) for place in block.places]

    asked = "tokens kept, as asked of presses"
    names = [asked] if len(block.models) == 1 else [f"{model}: {asked}" for model in block.models]
    spans = [(name, sum(place[0] == index for place in block.places)) for index, name in enumerate(names)]
    return _grid(block, "Scores by method and budget", columns, cells, spans)


def _cache_grid(block: Block) -> Grid:
    """Return scores and bytes of caches: without budgets bytes are what tells them apart."""
    columns = [Column(measure_name(block.measure), "95% interval"), Column("KV bytes", "of bf16")] * len(block.models)

    def cells(row: Row) -> list[Cell]:
        return [cell for place in block.places for cell in _score_and_bytes(row.runs.get(place), block.measure)]

    spans = [(model, 2) for model in block.models]
    return _grid(block, "Scores and bytes", columns, cells, spans if len(spans) > 1 else ())


def _score_and_bytes(entry: Entry | None, measure: Measure) -> tuple[Cell, Cell]:
    if entry is None:
        return Cell(), Cell()
    score, share = entry.summary.score, entry.summary.cost.kv_share_prefill
    text = number(score.mean, measure.unit)
    return Cell(text, bounds(score, measure), value=score.mean), Cell(percent(share), value=share)


def task_grids(block: Block) -> list[tuple[str, Grid]]:
    """Return the scores by task, one table per budget; none where there is one task alone."""
    if all(len(group.tasks) < 2 for group in block.groups):
        return []
    ratios = dict.fromkeys(ratio for _, ratio in block.places)
    return [(budget_name(ratio), _tasks(block, ratio)) for ratio in sorted(ratios)]


def speed_grids(block: Block) -> list[tuple[str, Grid]]:
    """Return the speeds of each model's runs: ratios to the baseline where one was measured alike, else tokens/s."""
    found = []
    for index, group in enumerate(block.groups):
        names = [name for name in SPEEDS if any(getattr(e.summary.cost, name) is not None for e in group.entries)]
        if names:
            found.append((block.models[index], _speeds(block, index, names)))
    return found


def memory_grids(block: Block) -> list[tuple[str, Grid]]:
    """Return the bytes that each model's runs held, and the largest peak of each method."""
    grids = [(model, _memory(block, index)) for index, model in enumerate(block.models)]
    return [(model, grid) for model, grid in grids if grid.rows]


def needle_tables(block: Block) -> list[Needles]:
    """Return a table per needle run whose samples were kept."""
    found = []
    for row in block.rows:
        for place, entry in sorted(row.runs.items(), key=lambda item: item[0]):
            if entry.run.has_depths:
                model = f", {block.models[place[0]]}" if len(block.models) > 1 else ""
                budget = f", {budget_name(place[1])} kept" if place[1] else ""
                found.append(_needles(entry, f"{row.label}{budget}{model}"))
    return found


def is_relative(group: Group, name: str) -> bool:
    """Whether a speed is shown as a ratio to the baseline."""
    others = [entry for entry in group.entries if not entry.summary.is_baseline]
    return any(group.speed_ratio(entry, name) is not None for entry in others)


def bounds(estimate: Estimate, measure: Measure) -> str:
    """Return an interval as `95.1–97`, without what says nothing in so small a place."""
    low, high = (number(value, measure.unit) for value in (estimate.low, estimate.high))
    return f"{low.removesuffix('.0')}–{high.removesuffix('.0')}"


def heat(score: float | None, measure: Measure) -> str:
    """Return the class of a score's shade; scores that are not percent have none."""
    return "" if score is None or measure.unit != "%" else f"h{min(10, max(0, round(score / 10)))}"


def _grid(
    block: Block,
    name: str,
    columns: Sequence[Column],
    cells: Callable[[Row], Sequence[Cell]],
    spans: Sequence[tuple[str, int]] = (),
) -> Grid:
    rows = [(index, row, tuple(cells(row))) for index, row in enumerate(block.rows)]
    kept = tuple(row for row in rows if any(cell.text != NOTHING for cell in row[2]))
    return Grid(name, tuple(spans), tuple(columns), kept)


def _held(block: Block, place: Place) -> str:
    """Return what the runs of a column really hold, as percent of bf16."""
    shares = [row.runs[place].summary.cost.kv_share_prefill for row in block.rows if place in row.runs]
    known = sorted(_round_percent(share) for share in shares if share is not None)
    return "" if not known else f"{known[0]:g}%" if known[0] == known[-1] else f"{known[0]:g}–{known[-1]:g}%"


def _round_percent(share: float) -> float:
    return round(100 * share, 0 if share >= 0.0995 else 1)


def _score(row: Row, place: Place, best: float | None, block: Block) -> Cell:
    entry, measure = row.runs.get(place), block.measure
    if entry is None:
        return Cell()
    score, share = entry.summary.score, entry.summary.cost.kv_share_prefill
    text, small = number(score.mean, measure.unit), bounds(score, measure)
    if place[1] and share is not None and not block.keeps_budget(place, entry):
        return Cell(f"{text}{OVER}", small, "over", score.mean)
    return Cell(text, small, "best" if shown(score.mean, measure) == best else "", score.mean)


def _tasks(block: Block, ratio: float) -> Grid:
    asked = [(index, task) for index, group in enumerate(block.groups) for task in _with_mean(group)]
    metrics = {task: score.metric for group in block.groups for entry in group.entries
               for task, score in entry.summary.tasks.items()}  # fmt: skip
    columns = [Column(task, metrics.get(task, "").replace("_", " ")) for _, task in asked]
    spans = [(model, len(_with_mean(group))) for model, group in zip(block.models, block.groups, strict=True)]

    def cells(row: Row) -> list[Cell]:
        return [_task(row.runs.get((index, ratio)), task, block.measure) for index, task in asked]

    return _grid(block, f"Scores by task, {budget_name(ratio)} kept", columns, cells, spans if len(spans) > 1 else ())


def _with_mean(group: Group) -> tuple[str, ...]:
    return (*group.tasks, MEAN) if len(group.tasks) > 1 else group.tasks


def _task(entry: Entry | None, task: str, measure: Measure) -> Cell:
    if entry is None or (task != MEAN and task not in entry.summary.tasks):
        return Cell()
    score = entry.summary.score if task == MEAN else entry.summary.tasks[task].estimate
    return Cell(number(score.mean, measure.unit), bounds(score, measure), heat(score.mean, measure), score.mean)


def _ratios(block: Block, index: int) -> list[float]:
    return [ratio for group, ratio in block.places if group == index]


def _speeds(block: Block, index: int, names: Sequence[str]) -> Grid:
    group, ratios = block.groups[index], _ratios(block, index)
    phases = [(SPEEDS[name], "times the baseline" if is_relative(group, name) else "tokens/s") for name in names]

    def cells(row: Row) -> list[Cell]:
        return [_speed(group, row.runs.get((index, ratio)), name) for name in names for ratio in ratios]

    columns, spans = _by_budget(block, ratios, phases)
    return _grid(block, f"Speed, {block.models[index]}", columns, cells, spans)


def _by_budget(
    block: Block, ratios: Sequence[float], measured: Sequence[tuple[str, str]]
) -> tuple[list[Column], list[tuple[str, int]]]:
    """Return a column per budget below each of what was measured, or a column for each where there are no budgets."""
    if not block.has_budgets:
        return [Column(name, unit) for name, unit in measured], []
    columns = [Column(budget_name(ratio)) for _ in measured for ratio in ratios]
    return columns, [(f"{name}, {unit}", len(ratios)) for name, unit in measured]


def _speed(group: Group, entry: Entry | None, name: str) -> Cell:
    if entry is None:
        return Cell()
    if not is_relative(group, name):
        speed = getattr(entry.summary.cost, name)
        return Cell(count(speed), value=speed)
    ratio = group.speed_ratio(entry, name)
    if ratio is None:
        return Cell()
    step = next((step for step, limit in ((3, 2.0), (2, 1.4), (1, 1.1)) if max(ratio, 1 / ratio) >= limit), 0)
    return Cell(times(ratio), look=f"{'fast' if ratio > 1 else 'slow'}{step}" if step else "", value=ratio)


def _memory(block: Block, index: int) -> Grid:
    ratios = _ratios(block, index)
    columns, spans = _by_budget(block, ratios, [(f"KV {name}", "share of bf16") for name in _SHARES.values()])

    def cells(row: Row) -> list[Cell]:
        own = [row.runs.get((index, ratio)) for ratio in ratios]
        shares = [getattr(e.summary.cost, name) if e is not None else None for name in _SHARES for e in own]
        peaks = [peak for entry in own if entry is not None and (peak := peak_bytes(entry)) is not None]
        held = [Cell(percent(share), look=_filled(share), value=share) for share in shares]
        return [*held, Cell(size(max(peaks)), value=max(peaks)) if peaks else Cell()]

    columns.append(Column("peak"))
    return _grid(block, f"Memory, {block.models[index]}", columns, cells, [*spans, ("", 1)] if spans else ())


def _filled(share: float | None) -> str:
    return "" if share is None else f"b{min(10, round(10 * share))}"


def _needles(entry: Entry, label: str) -> Needles:
    rows = entry.run.rows
    means = rows.groupby([DEPTH, "length"])["score"].mean().to_dict()
    depths, lengths = (sorted({float(value) for value in rows[name]}) for name in (DEPTH, "length"))
    measure = entry.summary.measure

    def cell(depth: float, length: float) -> Cell:
        mean = means.get((depth, length))
        return Cell() if mean is None else Cell(f"{100 * mean:.0f}", look=heat(100 * mean, measure), value=100 * mean)

    return Needles(
        label,
        tuple(f"{length:,.0f}" for length in lengths),
        tuple((f"{100 * depth:.3g}%", tuple(cell(depth, length) for length in lengths)) for depth in depths),
    )


def peak_bytes(entry: Entry) -> float | None:
    """Return the peak of the GPU, or of the process where there was none."""
    return entry.summary.cost.cuda_peak_bytes or entry.summary.cost.peak_memory_bytes


def size(count: float | None) -> str:
    """Return bytes as `1.9 MiB`."""
    return NOTHING if count is None else format_bytes(count)


def count(value: float | None) -> str:
    """Return a speed with the digits that matter."""
    return NOTHING if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
