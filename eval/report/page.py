"""Write the report: one HTML page that needs nothing else, its figures as PNG files, and its table as Markdown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.report.examples import wrong_answers
from pikv_hf.eval.report.figure_accuracy import draw_accuracy, is_drawn
from pikv_hf.eval.report.figure_needle import needle_entries, needle_figure
from pikv_hf.eval.report.figure_speed import has_speeds, is_relative, speed_figure
from pikv_hf.eval.report.figure_tasks import tasks_figure
from pikv_hf.eval.report.groups import Group, group_runs
from pikv_hf.eval.report.page_tables import Table, main_table, origins, tasks_table
from pikv_hf.eval.report.ratios import ratio_table
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.style import Styles, method_styles
from pikv_hf.eval.report.table import BYTES_NOTE, markdown_table, measure_name

PAGE = "report.html"
TABLE = "table.md"
RATIOS = "ratios.md"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the page: what it shows in words, and its PNG as a `data:` address."""

    caption: str
    alt: str
    source: str


@dataclass(frozen=True, slots=True)
class Section:
    """What the page shows of one group."""

    group: Group
    asked: str
    main: Table
    pictures: tuple[Picture, ...]
    tasks: Table | None
    not_shown: str


def write_report(runs: Sequence[Run], output: Path | str, title: str = "PiKV evaluation") -> Path:
    """Write `report.html`, its figures as PNG files, `table.md` (a row per run) and `ratios.md` (a row per method).

    The same runs give the same bytes. The page loads nothing, runs no script, and escapes all that models wrote.

    Parameters
    ----------
    runs : sequence of Run
        From `load_runs`.
    output : Path or str
        A folder; made where it is missing.
    title : str
        Of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If there are no runs or `output` is a file.
    """
    output = Path(output)
    if not runs:
        raise InputError("a report needs at least one run, got none")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, expected a folder for the report")
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / TABLE, markdown_table(runs))
    write_file(output / RATIOS, ratio_table(runs))
    page = output / PAGE
    write_file(page, _render(group_runs(runs), output, title))
    return page


def _render(groups: Sequence[Group], output: Path, title: str) -> str:
    styles = method_styles(groups)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        sections=[_section(group, output, styles) for group in groups],
        bytes_note=BYTES_NOTE,
        origins=origins([entry for group in groups for entry in group.entries]),
        wrong_answers=wrong_answers,
    )


def _section(group: Group, output: Path, styles: Styles) -> Section:
    several = len(group.tasks) > 1
    return Section(
        group=group,
        asked=_asked(group),
        main=main_table(group),
        pictures=tuple(_pictures(group, output, styles)),
        tasks=tasks_table(group) if several else None,
        not_shown=_not_shown(group),
    )


def _asked(group: Group) -> str:
    """One line on what was asked; differing numbers of samples are said, since intervals depend on them."""
    counts = sorted({entry.summary.samples for entry in group.entries})
    samples = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    tasks = f"{len(group.tasks)} tasks" if len(group.tasks) > 1 else "1 task"
    runs = f"{len(group.entries)} runs" if len(group.entries) > 1 else "1 run"
    return f"{runs}, {tasks}, {samples} samples each."


def _not_shown(group: Group) -> str:
    """One line on runs that have no answers to show, empty where there are none."""
    without = sum(entry.run.samples is None for entry in group.entries)
    return f"The samples of {without} of {len(group.entries)} runs were not kept: no answers of these." * bool(without)


def _pictures(group: Group, output: Path, styles: Styles) -> list[Picture]:
    pictures = []
    if any(is_drawn(entry) for entry in group.entries):
        path = draw_accuracy([group], output / f"{group.slug}-accuracy.png", styles)
        pictures.append(_picture(path, _accuracy_caption(group), f"{measure_name(group.measure)} against KV bytes"))
    if len(group.tasks) > 1:
        path = tasks_figure(group, output / f"{group.slug}-tasks.png", styles)
        pictures.append(_picture(path, "Scores by task; the table below has the intervals.", "Scores by task"))
    if needle_entries(group):
        path = needle_figure(group, output / f"{group.slug}-needle.png")
        caption = "Score by depth of the needle (0% is the beginning of the context) and length of the context."
        pictures.append(_picture(path, caption, "Needle in a haystack, one heat map per run"))
    if has_speeds(group):
        path = speed_figure(group, output / f"{group.slug}-speed.png", styles)
        pictures.append(_picture(path, _speed_caption(group), "Speed of prefill and decoding"))
    return pictures


def _accuracy_caption(group: Group) -> str:
    unplaced = [entry.label for entry in group.entries if not is_drawn(entry)]
    missing = f" Not shown, since their bytes were not measured: {', '.join(unplaced)}." if unplaced else ""
    return (
        "Score with its 95% interval against the bytes that the cache really holds. A line joins the compression "
        "ratios of one method; methods that only mask tokens stay where DynamicCache is. Rings and the grey line "
        f"mark the Pareto front: no other run is better in both.{missing}"
    )


def _speed_caption(group: Group) -> str:
    if not is_relative(group, "prefill_tokens_per_s") and not is_relative(group, "decode_tokens_per_s"):
        return "Tokens per second; there is no baseline on the same machine to compare with."
    return (
        "Speed relative to DynamicCache without a press, higher is faster. A dash means that the baseline was measured "
        "on another machine, or with another dtype, batch size or number of processes."
    )


def _picture(path: Path, caption: str, what: str) -> Picture:
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(caption, f"{what}. The tables have the same numbers.", source)
