"""One line for each cache: what it is good for, with what was measured here."""

from pikv_hf.eval.demo.caches import PRESS_SHARE
from pikv_hf.eval.demo.measure import Measurement
from pikv_hf.eval.demo.result import DemoResult


def good_for(result: DemoResult) -> dict[str, str]:
    """Return the line of each cache by its name; for one that was not measured, why."""
    lines = {
        result.dynamic.cache: "one question on a short text: nothing to set up.",
        result.pikv.cache: _exact(result),
        result.int4.cache: f"longer texts: {_saves(result, result.int4)}.",
    }
    if result.press is None:
        lines["PiKVPress"] = (result.press_missing or "").removeprefix("PiKVPress ")
    else:
        lines[result.press.cache] = f"the longest texts: {_saves(result, result.press)}."
    return lines


def describe_press_share(result: DemoResult) -> str:
    """Return what PiKVPress was asked to keep, and why it kept more if it did."""
    asked = f"PiKVPress keeps {PRESS_SHARE:.2%} of DynamicCache's {result.dtype} bytes of the text, metadata included"
    assert result.press is not None
    if result.press.context_bytes > PRESS_SHARE * result.dynamic.context_bytes:
        return f"{asked}; here the text is so short that its window and a page per head take more."
    return f"{asked}."


def _exact(result: DemoResult) -> str:
    if not result.agree:
        return f"NOT THE SAME: {result.describe_disagreement()}."
    share = result.pikv.open_bytes / result.dynamic.open_bytes
    return f"many questions, one text: same tokens, {share:.1%} of the bytes."


def _saves(result: DemoResult, cache: Measurement) -> str:
    share = cache.context_bytes / result.dynamic.context_bytes
    answers = "answers right" if result.judged else "answers the same"
    return f"{share:.1%} of the bytes, {result.describe_answers(cache)} {answers}"
