"""Show a comparison as Markdown, which reads well in a terminal too."""

from pikv_hf.eval.report.compare import OVERALL, Comparison, Difference
from pikv_hf.eval.report.table import NOTHING, escape, markdown, number, times

_HEADER = (
    "task",
    "pairs",
    "A",
    "B",
    "B - A",
    "95% interval",
    "p",
    "p (Holm)",
    "wins",
    "losses",
    "ties",
    "texts differ",
)
_COSTS = {
    "kv_bytes_prefill": "KV bytes after prefill",
    "kv_bytes_end": "KV bytes at end",
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "peak_memory_bytes": "peak memory of the process",
    "cuda_peak_bytes": "peak memory of the GPU",
}


def comparison_text(comparison: Comparison) -> str:
    """Return a comparison as Markdown: what was compared, the table of tasks, the costs, and how to read it."""
    rows = [_cells(each, comparison.measure.unit) for each in (comparison.overall, *comparison.tasks)]
    ratios = dict(comparison.cost_ratios)
    costs = [[name, times(ratios[field])] for field, name in _COSTS.items()]
    return "\n".join(
        [
            f"A: {escape(comparison.label_a)}  ",
            f"B: {escape(comparison.label_b)}",
            *_left_out(comparison),
            "",
            markdown(_HEADER, rows),
            markdown(("cost of the whole runs", "B / A"), costs),
            _explanation(comparison),
            "",
        ]
    )


def _cells(each: Difference, unit: str) -> list[str]:
    digits = 2 if unit == "%" else 3
    return [
        each.task,
        str(each.samples),
        number(each.mean_a, unit),
        number(each.mean_b, unit),
        f"{each.mean:+.{digits}f}",
        f"{each.low:+.{digits}f} to {each.high:+.{digits}f}",
        f"{each.p_value:.4f}",
        NOTHING if each.task == OVERALL else f"{each.p_holm:.4f}",
        *(str(count) for count in (each.wins, each.losses, each.ties, each.texts_differ)),
    ]


def _left_out(comparison: Comparison) -> list[str]:
    if not comparison.only_a and not comparison.only_b:
        return []
    return ["", f"Partial: {comparison.only_a} samples of A alone and {comparison.only_b} of B alone are left out."]


def _explanation(comparison: Comparison) -> str:
    good = "higher" if comparison.measure.higher_is_better else "lower"
    return (
        f"Scores and differences in {comparison.unit}, {good} is better. Overall is the mean over tasks. Intervals: "
        "paired bootstrap within tasks. p: two-sided paired sign-flip permutation test; Holm corrects for the number "
        "of tasks. Wins: pairs in which B is better."
    )
