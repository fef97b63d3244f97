"""Split Chinese words and punctuation as LongBench's metrics see them."""

import functools
import string
import warnings
from collections.abc import Iterator
from typing import Any

with warnings.catch_warnings():
    # jieba asks pkg_resources for its dictionary, which announces its own end at every import.
    warnings.simplefilter("ignore")
    import jieba

LANGUAGES = ("en", "zh")

#: First and last characters of the runs of punctuation that LongBench strips beside ASCII's. Its list has gaps: the
#: opening book-title mark (U+300A) and the full-width full stop (U+FF0E) stay, and published figures include that.
_PUNCTUATION_RUNS = (
    *("–—", "‘’", "‛‟", "…‧", "、〃", "》】", "〔〟", "〰", "〾〿", "﹏"),
    *("！－", "／", "：＠", "［｀", "｛､"),
)


def _punctuation() -> Iterator[str]:
    yield from string.punctuation
    for run in _PUNCTUATION_RUNS:
        yield from map(chr, range(ord(run[0]), ord(run[-1]) + 1))


PUNCTUATION = frozenset(_punctuation())


def segment(text: str) -> list[str]:
    """Cut a text into words with jieba's default dictionary; joined again they are the text."""
    return list(_segmenter().cut(text, cut_all=False))


@functools.cache
def _segmenter() -> Any:
    """Return a segmenter of our own, so that words which others add to jieba's global one change no score.

    jieba would keep its dictionary as a marshalled file in the shared temporary folder, write it from every process
    and trust what it finds there. Reading the text takes about a second and none of that.
    """
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def check_language(language: str) -> None:
    """Raise a `ValueError` for anything but the two languages of LongBench's metrics."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
