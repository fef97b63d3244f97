"""Make metrics by name."""

from collections.abc import Callable

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.metrics.base import SampleMetric
from pikv_hf.eval.metrics.classification import Classification
from pikv_hf.eval.metrics.edit_similarity import EditSimilarity
from pikv_hf.eval.metrics.retrieval import Count, Retrieval
from pikv_hf.eval.metrics.rouge_l import RougeL
from pikv_hf.eval.metrics.string_match import StringMatchAll, StringMatchPart
from pikv_hf.eval.metrics.token_f1 import TokenF1

METRICS: dict[str, Callable[[], SampleMetric]] = {
    "string_match_all": StringMatchAll,
    "string_match_part": StringMatchPart,
    "qa_f1": TokenF1,
    "qa_f1_zh": lambda: TokenF1("zh"),
    "rouge_l": RougeL,
    "rouge_l_zh": lambda: RougeL("zh"),
    "classification": Classification,
    "retrieval_en": Retrieval,
    "retrieval_zh": lambda: Retrieval("zh"),
    "count": Count,
    "edit_similarity": EditSimilarity,
}


def make_metric(name: str) -> SampleMetric:
    """Build a metric.

    Raises
    ------
    ValueError
        For an unknown name (with a suggestion).
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}; known: {', '.join(METRICS)}")
    return METRICS[name]()
