"""Score answers as RULER does."""

from functools import cache

from pikv_hf.eval.metrics.string_match import StringMatchAll, StringMatchPart
from pikv_hf.eval.tasks.ruler.templates import family
from pikv_hf.eval.tasks.sample import EvalSample, Scores


def score(sample: EvalSample, prediction: str) -> Scores:
    """Score the text that a model wrote after the answer prefix.

    `string_match` is the share of the references that the answer contains, whatever their case; for question answering,
    whose references are alternatives, it is 1 if any of them is contained. As in the official evaluation, a newline
    stands for each control character (U+0000 to U+001F) before they are compared.
    """
    metric = _match_part() if family(sample.task) == "qa" else _match_all()
    return {"string_match": metric.score(prediction, sample.answers)}


# A metric of `evaluate` takes milliseconds to make, and there are thousands of answers.
@cache
def _match_all() -> StringMatchAll:
    return StringMatchAll()


@cache
def _match_part() -> StringMatchPart:
    return StringMatchPart()
