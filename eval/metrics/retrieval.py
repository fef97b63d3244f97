"""Numbers in the answer against the number asked for.

Source: LongBench (Bai et al., 2023), `metrics.py`.
"""

import re
from collections.abc import Sequence

from pikv_hf.eval.metrics.base import SampleMetric
from pikv_hf.eval.metrics.chinese import check_language

_CITATION = "Bai et al., LongBench, 2023"
_LABEL = {"en": "Paragraph ", "zh": "段落"}


class Retrieval(SampleMetric):
    """The share of the answer's numbers that are the number of the right paragraph; best over references.

    Parameters
    ----------
    language : str
        References read `Paragraph 7` (`"en"`) or `段落7` (`"zh"`).

    Raises
    ------
    ValueError
        From `score`, if a reference holds no such number.
    """

    def __init__(self, language: str = "en") -> None:
        check_language(language)
        self._label = _LABEL[language]
        super().__init__(f"retrieval_{language}", "Share of the right paragraph among the numbers named.", _CITATION)

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        number = re.search(re.escape(self._label) + r"(\d+)", reference)
        if number is None:
            raise ValueError(f"{self.key}: a reference must hold '{self._label}' and a number, got {reference!r}")
        return share_of_number(prediction, number[1])


class Count(SampleMetric):
    """The share of the answer's numbers that equal the reference; best over references."""

    def __init__(self) -> None:
        super().__init__("count", "Share of the right number among the numbers named.", _CITATION)

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        return share_of_number(prediction, reference)


def share_of_number(text: str, number: str) -> float:
    """Return the share of the runs of digits in `text` that are `number`, digit by digit (`07` is not `7`)."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(number) / len(numbers) if numbers else 0.0
