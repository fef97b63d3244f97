"""Make a short table: one row per method, one column per compression ratio."""

from collections.abc import Sequence

from pikv_hf.eval.report.groups import Group, group_runs
from pikv_hf.eval.report.runs import Run
from pikv_hf.eval.report.table import NOTHING, escape, markdown, measure_name, number


def ratio_table(runs: Sequence[Run]) -> str:
    """Return the runs as Markdown, one table per group, each under its title if there are several.

    A cell reads `93.6 at 150%`: the mean score, and the KV bytes after the prefill in percent of what `DynamicCache`
    would hold in bf16. Runs without a press have the ratio 0.
    """
    groups = group_runs(runs)
    if len(groups) == 1:
        return _table(groups[0])
    return "\n".join(f"**{escape(group.title)}**\n\n{_table(group)}" for group in groups)


def _table(group: Group) -> str:
    ratios = sorted({entry.summary.compression_ratio for entry in group.entries})
    header = [f"{measure_name(group.measure)} at KV bytes", *(f"{100 * ratio:.4g}% removed" for ratio in ratios)]
    methods = dict.fromkeys(entry.method for entry in group.entries)
    return markdown(header, [[method, *(_cell(group, method, ratio) for ratio in ratios)] for method in methods])


def _cell(group: Group, method: str, ratio: float) -> str:
    runs = [each.summary for each in group.entries if (each.method, each.summary.compression_ratio) == (method, ratio)]
    if not runs:
        return NOTHING
    share = runs[0].cost.kv_share_prefill
    score = number(runs[0].score.mean, group.measure.unit)
    return score if share is None else f"{score} at {share:.0%}"
