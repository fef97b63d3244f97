"""RULER's string match: are the references in the answer?

Source: RULER (Hsieh et al., 2024), `scripts/eval`. There, as here, the answer is stripped and every control character
in it becomes a newline, so that words on two lines do not join to a third. (kvpress removes the characters instead.)
"""

import re
from collections.abc import Sequence

from pikv_hf.eval.metrics.base import SampleMetric

_CITATION = "Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024"
_CONTROL = re.compile(r"[\x00-\x1f]")


class StringMatchAll(SampleMetric):
    """The share of references that the answer contains, whatever their case: RULER's score of all tasks but QA."""

    def __init__(self) -> None:
        super().__init__("string_match_all", "Share of references that the answer contains.", _CITATION)

    def _score(self, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None) -> float:
        found = contained(prediction, references)
        return sum(found) / len(found)


class StringMatchPart(SampleMetric):
    """1 if the answer contains any reference, whatever its case, else 0: RULER's score of QA."""

    def __init__(self) -> None:
        super().__init__("string_match_part", "Whether the answer contains any reference.", _CITATION)

    def _score(self, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None) -> float:
        return float(any(contained(prediction, references)))


def contained(prediction: str, references: Sequence[str]) -> list[bool]:
    """Return for each reference whether the answer contains it.

    Raises
    ------
    ValueError
        If a reference is empty: every answer would contain it.
    """
    if not all(references):
        raise ValueError(f"string match: a reference must not be empty, got {list(references)}")
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]
