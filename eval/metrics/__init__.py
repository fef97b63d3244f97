"""Metrics of the evaluation suites, as `evaluate.Metric` subclasses that need no network.

An answer and its references come in, a score between 0 and 1 goes out; a metric is the mean over answers. Imports
nothing else of the evaluation. Model answers are data: they are compared, never evaluated.
"""

from pikv_hf.common.extras import extra

with extra("eval", needed_by=__name__):
    from pikv_hf.eval.metrics.base import SampleMetric
    from pikv_hf.eval.metrics.classification import Classification
    from pikv_hf.eval.metrics.edit_similarity import EditSimilarity
    from pikv_hf.eval.metrics.registry import METRICS, make_metric
    from pikv_hf.eval.metrics.retrieval import Count, Retrieval
    from pikv_hf.eval.metrics.rouge_l import RougeL
    from pikv_hf.eval.metrics.string_match import StringMatchAll, StringMatchPart
    from pikv_hf.eval.metrics.token_f1 import TokenF1

__all__ = [
    "METRICS",
    "Classification",
    "Count",
    "EditSimilarity",
    "Retrieval",
    "RougeL",
    "SampleMetric",
    "StringMatchAll",
    "StringMatchPart",
    "TokenF1",
    "make_metric",
]
