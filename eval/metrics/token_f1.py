"""F1 over the words that answer and reference share.

Source: SQuAD's evaluation (Rajpurkar et al., 2016), adapted to Chinese by LongBench (Bai et al., 2023, `metrics.py`).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from pikv_hf.eval.metrics.base import SampleMetric
from pikv_hf.eval.metrics.chinese import PUNCTUATION, check_language, segment

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenF1(SampleMetric):
    """F1 of the words in common, counted with their number; best over references.

    Parameters
    ----------
    language : str
        `"en"`: lower case, without ASCII punctuation and articles, split at white space. `"zh"`: jieba's words, lower
        case, without punctuation and white space.

    Notes
    -----
    Two texts without any word share nothing, so they score 0 even if they are equal.
    """

    def __init__(self, language: str = "en") -> None:
        check_language(language)
        self._tokens = _TOKENS[language]
        name = "qa_f1" if language == "en" else "qa_f1_zh"
        super().__init__(
            name, "F1 of the words in common.", "Rajpurkar et al., SQuAD, 2016; Bai et al., LongBench, 2023"
        )

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        return f1(self._tokens(prediction), self._tokens(reference))


def english_tokens(text: str) -> list[str]:
    """Return the words that SQuAD compares. Punctuation goes first, so that `a.` is an article too."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def chinese_tokens(text: str) -> list[str]:
    """Return the words that LongBench compares in Chinese: segmented first, then cleaned."""
    words = ("".join("".join(c for c in word.lower() if c not in PUNCTUATION).split()) for word in segment(text))
    return [word for word in words if word]


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of the tokens in common; 0 without any."""
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


_TOKENS: dict[str, Callable[[str], list[str]]] = {"en": english_tokens, "zh": chinese_tokens}
