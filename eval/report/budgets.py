"""Compare presses at equal bytes: a row per method, a column per share of the bytes that a press was asked to leave."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report.groups import Entry, Group, group_runs
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.summary_file import Summary
from pikv_hf.eval.report.table import NOTHING, Bold, markdown, measure_name, number

#: A run competes for the best of its column if its measured bytes are at most so far above the column's, relatively.
TOLERANCE = 0.1

#: PiKVCache in this comparison: nothing outside of pages, and one shard, or eight for presses that divide by shards.
CACHE = "pikv:recent_window=0,sink_tokens=0,num_shards=1"
SHARDED = "pikv:recent_window=0,sink_tokens=0,num_shards=8"

#: The variants that the original was evaluated as (arXiv 2508.06526), each as the press and cache that come closest.
#: (A) and (F) differ in where tokens are placed, which changes no result.
VARIANTS: dict[str, tuple[str | None, str]] = {
    "A": ("DuoPress", CACHE),
    "B": ("PyramidPress(headwise=True)", SHARDED),
    "C": ("LoRAPress", CACHE),
    "D": ("ExpertPress(router_weight=1)", CACHE),
    "E": ("ComposedPress([LoRAPress, ChunkKVPress(SnapKVPress)])", CACHE),
    "F": ("DuoPress", CACHE),
    "G": (None, "dynamic"),
}

#: What `ExpertPress` has to beat.
CONTROL = 'ExpertPress(router="random")'


@dataclass(frozen=True, slots=True)
class MethodRuns:
    """Runs of one press on one kind of cache at several budgets.

    Attributes
    ----------
    label : str
        For tables and figures.
    own : bool
        Whether the press is this project's.
    runs : tuple of Entry
        From the largest budget to the smallest; one run without a press.
    """

    label: str
    own: bool
    runs: tuple[Entry, ...]

    @property
    def press(self) -> str | None:
        """The press as it was asked for."""
        return self.runs[0].summary.press

    def at(self, ratio: float) -> Entry | None:
        """Return the run whose press was asked to remove this share."""
        return next((run for run in self.runs if run.summary.compression_ratio == ratio), None)


def budget_table(runs: Sequence[Run]) -> str:
    """Return the runs as Markdown: a row per method, a column per budget.

    A cell reads `93.6 at 26.1%`: the mean score, and the KV bytes after the prefill in percent of what `DynamicCache`
    would hold in bf16. The best of a column is bold, of the runs whose bytes are within :data:`TOLERANCE` of it.
    Letters in parentheses are the variants of the original, see :data:`VARIANTS`.

    Raises
    ------
    InputError
        If the runs are of several data sets, lengths or models.
    """
    group = one_group(runs)
    ratios = sorted({entry.summary.compression_ratio for entry in group.entries})
    columns = [f"{100 * (1 - ratio):.4g}%" if ratio else "all" for ratio in ratios]
    found = methods(group)
    best = {ratio: _best(found, group, ratio) for ratio in ratios if ratio}
    rows = [[each.label, *(_cell(each.at(ratio), group, best.get(ratio)) for ratio in ratios)] for each in found]
    return markdown([f"{measure_name(group.measure)} at KV bytes", *columns], rows)


def one_group(runs: Sequence[Run]) -> Group:
    """Return runs that can be compared as their group; others are refused."""
    groups = group_runs(runs)
    if len(groups) != 1:
        titles = "; ".join(group.title for group in groups)
        raise InputError(f"presses are compared on one data set, length and model, got {len(groups)}: {titles}")
    return groups[0]


def methods(group: Group) -> list[MethodRuns]:
    """Return the methods of a group: caches without a press, this project's presses, then the others, by name."""
    keyed: dict[tuple[str | None, str], list[Entry]] = {}
    for entry in group.entries:
        keyed.setdefault((entry.summary.press, entry.summary.cache), []).append(entry)
    found = [_method(entries) for entries in keyed.values()]
    return sorted(found, key=_order)


def _method(entries: Iterable[Entry]) -> MethodRuns:
    ordered = sorted(entries, key=lambda entry: entry.summary.compression_ratio)
    summary = ordered[0].summary
    return MethodRuns(_label(summary), _is_own(summary.press), tuple(ordered))


def _order(method: MethodRuns) -> tuple[object, ...]:
    """Sort a control, which is an option of its press, right behind the press."""
    press, full = method.press or "", not method.runs[0].summary.is_baseline
    composed = press.startswith("ComposedPress")
    return (bool(press), not method.own, press != "PiKVPress", composed, press, full, method.label)


def _label(summary: Summary) -> str:
    chosen = summary.press, summary.cache
    letters = [f"({letter})" for letter, variant in VARIANTS.items() if variant == chosen]
    control = ["(control)"] if summary.press == CONTROL else []
    return " ".join([f"{summary.press or ''}{_cache_note(summary)}", *control, *letters])


def _cache_note(summary: Summary) -> str:
    """Name the cache, or say of it behind a press what is not usual: this project's are on PiKVCache."""
    paged = summary.cache in (CACHE, SHARDED)
    if summary.press is None:
        return "DynamicCache" if summary.is_baseline else "PiKVCache" if paged else summary.label
    if paged if _is_own(summary.press) else summary.cache == "dynamic":
        return ""
    return f" on {'PiKVCache' if paged else summary.cache}"


def _is_own(press: str | None) -> bool:
    """Return whether a press, or one within it, is this project's."""
    # Reports of other runs need no kvpress, which takes seconds to import.
    from pikv_hf import presses

    return press is not None and not set(re.findall(r"\w+", press)).isdisjoint(presses.__all__)


def _best(found: Sequence[MethodRuns], group: Group, ratio: float) -> float | None:
    """Return the best score, as it is shown, of the runs that keep to a budget; None if there are not two of them."""
    limit = (1 + TOLERANCE) * (1 - ratio)
    entries = [entry for method in found if (entry := method.at(ratio)) is not None]
    scores = [
        round(entry.summary.score.mean, 1)
        for entry in entries
        if entry.summary.cost.kv_share_prefill is not None and entry.summary.cost.kv_share_prefill <= limit
    ]
    if len(scores) < 2:
        return None
    return max(scores) if group.measure.higher_is_better else min(scores)


def _cell(entry: Entry | None, group: Group, best: float | None) -> str:
    if entry is None:
        return NOTHING
    share, score = entry.summary.cost.kv_share_prefill, entry.summary.score.mean
    shown = number(score, group.measure.unit)
    if share is None:
        return shown
    text = f"{shown} at {share:.1%}"
    within = share <= (1 + TOLERANCE) * (1 - entry.summary.compression_ratio)
    return Bold(text) if within and round(score, 1) == best else text
