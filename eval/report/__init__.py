"""Reports from result folders: figures, an HTML page, Markdown tables and paired comparisons.

Result folders of `pikv eval` come in, all of their fields checked; files come out, the same bytes for the same results:
`groups` are runs that may be compared, `overview` arranges them as methods by budgets, `page_*` fill the page's tables.
May import the runner's names of files; knows no model and no cache. Tables and figures need summaries alone,
comparisons and examples the samples too.
"""

from pikv_hf.common.extras import extra

with extra("eval", needed_by=__name__):
    from pikv_hf.eval.report.budgets import budget_table
    from pikv_hf.eval.report.compare import Comparison, Difference, compare
    from pikv_hf.eval.report.compare_view import comparison_text
    from pikv_hf.eval.report.figure_accuracy import accuracy_figure
    from pikv_hf.eval.report.figure_budgets import budget_figure
    from pikv_hf.eval.report.page import write_report
    from pikv_hf.eval.report.ratios import ratio_table
    from pikv_hf.eval.report.runs import Run, load_runs
    from pikv_hf.eval.report.table import markdown_table

__all__ = [
    "Comparison",
    "Difference",
    "Run",
    "accuracy_figure",
    "budget_figure",
    "budget_table",
    "compare",
    "comparison_text",
    "load_runs",
    "markdown_table",
    "ratio_table",
    "write_report",
]
