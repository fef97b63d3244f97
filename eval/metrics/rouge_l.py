"""ROUGE-L, the longest common subsequence of words.

Source: Lin, 2004 (summary level), as the `rouge` package computes it, since LongBench's published figures do.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rouge import Rouge

from pikv_hf.eval.metrics.base import SampleMetric
from pikv_hf.eval.metrics.chinese import check_language, segment

_CITATION = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; Bai et al., LongBench, 2023"


class RougeL(SampleMetric):
    """F-measure of ROUGE-L at summary level; best over references.

    Parameters
    ----------
    language : str
        `"en"`: words are what white space separates. `"zh"`: words are jieba's.

    Notes
    -----
    The package's definition, which the published figures contain: case and punctuation count, sentences end at `.` only
    (a Chinese text is one sentence), and each word counts once however often it occurs. A small constant in the
    denominator keeps equal texts at 1 - 5e-9.

    A text without a sentence, such as an empty answer, scores 0.

    The package follows the subsequence recursively, with up to one call per word of two sentences, and fails beyond
    Python's limit, by default 1,000. LongBench's script catches that error and scores such an answer 0, however good it
    is. Here the limit is raised as far as the texts need, and the score is the one that the definition gives.
    """

    def __init__(self, language: str = "en") -> None:
        check_language(language)
        self._language = language
        self._rouge = Rouge(metrics=["rouge-l"], stats=["f"])
        name = "rouge_l" if language == "en" else "rouge_l_zh"
        super().__init__(name, "F-measure of the longest common subsequence of words.", _CITATION)

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        if self._language == "zh":
            prediction, reference = " ".join(segment(prediction)), " ".join(segment(reference))
        if not (has_sentence(prediction) and has_sentence(reference)):
            return 0.0
        with room_for_recursion(len(prediction.split(" ")) + len(reference.split(" "))):
            return float(self._rouge.get_scores(prediction, reference)[0]["rouge-l"]["f"])


def has_sentence(text: str) -> bool:
    """Return whether anything stands between the full stops; the package cannot compare less."""
    return any(text.split("."))


@contextmanager
def room_for_recursion(calls: int) -> Iterator[None]:
    """Let code call itself `calls` times more than it could. Python's own calls take no C stack since 3.11."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + calls)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
