"""The sets of LongBench and LongBench-E, and how each is answered and scored.

Source: LongBench (Bai et al., 2023, https://arxiv.org/abs/2308.14508), its `config/dataset2maxlen.json`, `pred.py` and
`eval.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pikv_hf.common.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class LongBenchSet:
    """One set of samples.

    Attributes
    ----------
    name : str
        As LongBench calls it.
    metric : str
        Name in `pikv_hf.eval.metrics.METRICS`.
    max_new_tokens : int
        Limit of the answer.
    cue : str
        What stands before the answer: the end of the prompt.
    few_shot : bool
        The context is a list of solved examples. Then the cue is the end of the sample's own input, not of the
        template, and only the first line of the answer counts, since models go on with further examples.
    """

    name: str
    metric: str
    max_new_tokens: int
    cue: str
    few_shot: bool = False


_ALL = (
    LongBenchSet("narrativeqa", "qa_f1", 128, "Answer:"),
    LongBenchSet("qasper", "qa_f1", 128, "Answer:"),
    LongBenchSet("multifieldqa_en", "qa_f1", 64, "Answer:"),
    LongBenchSet("multifieldqa_zh", "qa_f1_zh", 64, "回答："),
    LongBenchSet("hotpotqa", "qa_f1", 32, "Answer:"),
    LongBenchSet("2wikimqa", "qa_f1", 32, "Answer:"),
    LongBenchSet("musique", "qa_f1", 32, "Answer:"),
    LongBenchSet("dureader", "rouge_l_zh", 128, "回答："),
    LongBenchSet("gov_report", "rouge_l", 512, "Summary:"),
    LongBenchSet("qmsum", "rouge_l", 512, "Answer:"),
    LongBenchSet("multi_news", "rouge_l", 512, "Summary:"),
    LongBenchSet("vcsum", "rouge_l_zh", 512, "会议总结："),
    LongBenchSet("trec", "classification", 64, "Type:", few_shot=True),
    LongBenchSet("triviaqa", "qa_f1", 32, "Answer:", few_shot=True),
    LongBenchSet("samsum", "rouge_l", 128, "Summary:", few_shot=True),
    LongBenchSet("lsht", "classification", 64, "类别：", few_shot=True),
    LongBenchSet("passage_count", "count", 32, "The final answer is: "),
    LongBenchSet("passage_retrieval_en", "retrieval_en", 32, "The answer is: "),
    LongBenchSet("passage_retrieval_zh", "retrieval_zh", 32, "答案是："),
    LongBenchSet("lcc", "edit_similarity", 64, "Next line of code:\n"),
    LongBenchSet("repobench-p", "edit_similarity", 64, "Next line of code:\n"),
)

#: The 21 sets by name, in LongBench's order.
SETS: Mapping[str, LongBenchSet] = MappingProxyType({entry.name: entry for entry in _ALL})

_ONLY_FULL = ("narrativeqa", "multifieldqa_zh", "musique", "dureader", "qmsum", "vcsum", "lsht", "passage_retrieval_zh")

#: The 13 sets of LongBench-E: English and code, with about as many samples in each bucket of length.
SETS_E: Mapping[str, LongBenchSet] = MappingProxyType(
    {name: entry for name, entry in SETS.items() if name not in _ONLY_FULL}
)


def find_sets(names: Collection[str], *, e: bool = False) -> list[LongBenchSet]:
    """Look sets up by name.

    Raises
    ------
    ValueError
        For no name, an unknown one (with a suggestion), or one given twice.
    """
    known, suite = (SETS_E, "LongBench-E") if e else (SETS, "LongBench")
    if isinstance(names, str) or not names:
        raise ValueError(f"expected a list of {suite} sets, got {names!r}")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"unknown {suite} set {name!r}{hint}; known: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"each {suite} set may be given once, got {', '.join(names)}")
    return [known[name] for name in names]
