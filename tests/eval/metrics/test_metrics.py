"""The metrics against hand-computed cases, slow definitions and the properties that every score has."""

import difflib
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge import Rouge

from pikv_hf.eval.metrics import METRICS, EditSimilarity, SampleMetric, TokenF1, make_metric
from pikv_hf.eval.metrics.chinese import PUNCTUATION, segment
from pikv_hf.eval.metrics.classification import named_labels
from pikv_hf.eval.metrics.edit_similarity import first_code_line, ratio
from pikv_hf.eval.metrics.token_f1 import chinese_tokens, english_tokens

pytestmark = pytest.mark.slow

LABELS = ["number", "other number", "person", "title of a person", "other"]
#: A reference of each metric that the answer can repeat.
IDENTITY = {
    "string_match_all": "4711",
    "string_match_part": "4711",
    "qa_f1": "the grey harbour",
    "qa_f1_zh": "灰色的港口",
    "rouge_l": "It rained. The fair was moved.",
    "rouge_l_zh": "下雨了，集市改期。",
    "classification": "title of a person",
    "retrieval_en": "Paragraph 12",
    "retrieval_zh": "段落12",
    "count": "7",
    "edit_similarity": "    return self.pages[index]",
}


def score(name: str, prediction: str, *references: str) -> float:
    return make_metric(name).score(prediction, references, all_classes=LABELS)


class TestEvery:
    @pytest.mark.parametrize("name", METRICS)
    def test_repeating_the_reference_scores_one(self, name: str) -> None:
        assert score(name, IDENTITY[name], IDENTITY[name]) == pytest.approx(1, abs=1e-8)

    @pytest.mark.parametrize("name", METRICS)
    def test_an_empty_answer_scores_zero(self, name: str) -> None:
        assert score(name, "", IDENTITY[name]) == 0

    @pytest.mark.parametrize("name", METRICS)
    @given(data=st.data())
    @settings(max_examples=40)
    def test_scores_lie_between_zero_and_one_and_grow_with_references(self, name: str, data: st.DataObject) -> None:
        words = st.sampled_from(
            [*IDENTITY.values(), *LABELS, "7", "12", "a", ".", "。", "\n", " ", "`", "港口", "\x00"]
        )
        prediction = data.draw(st.lists(words | st.text(max_size=5), max_size=8).map("".join))
        alone = score(name, prediction, IDENTITY[name])
        both = score(name, prediction, IDENTITY[name], IDENTITY[name].replace("1", "2"))
        assert 0 <= alone <= 1
        # The one metric that asks for all references may lose by a further one.
        assert alone <= both <= 1 or name == "string_match_all"

    @pytest.mark.parametrize("name", METRICS)
    def test_compute_is_the_mean_in_percent_under_the_metrics_name(self, name: str) -> None:
        right = IDENTITY[name]
        result = make_metric(name).compute(
            predictions=[right, "", ""], references=[[right], [right, right], [right]], all_classes=LABELS
        )
        assert result == {name: pytest.approx(100 / 3, abs=1e-6)}

    def test_scores_of_a_shared_metric_do_not_depend_on_each_other(self) -> None:
        metric = make_metric("qa_f1")
        assert [metric.compute(predictions=[p], references=[["b"]]) for p in "bcb"] == [
            {"qa_f1": 100},
            {"qa_f1": 0},
            {"qa_f1": 100},
        ]

    @pytest.mark.parametrize("name", METRICS)
    def test_name_in_the_registry_is_the_key(self, name: str) -> None:
        assert make_metric(name).key == name

    def test_unknown_name_comes_with_a_suggestion(self) -> None:
        with pytest.raises(ValueError, match=r"unknown metric 'rouge-l', did you mean 'rouge_l'\?"):
            make_metric("rouge-l")

    @pytest.mark.parametrize(
        ("prediction", "references", "error", "message"),
        [
            ("x", "x", TypeError, "references must be a list of str, got 'x'"),
            ("x", [1], TypeError, r"references must be a list of str, got \[1\]"),
            (1, ["x"], TypeError, "prediction must be a str, got int"),
            ("x", [], ValueError, "expected at least one reference, got none"),
        ],
    )
    def test_wrong_input_is_named(
        self, prediction: str, references: Sequence[str], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            make_metric("qa_f1").score(prediction, references)

    def test_no_predictions_have_no_mean(self) -> None:
        with pytest.raises(ValueError, match="expected at least one prediction, got none"):
            make_metric("qa_f1").compute(predictions=[], references=[])

    def test_unequal_numbers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"predictions \(2\) and references \(1\)"):
            make_metric("qa_f1").compute(predictions=["a", "b"], references=[["a"]])

    @pytest.mark.slow
    def test_nothing_is_written_to_disk(self, tmp_path: Path) -> None:
        code = (
            "from pikv_hf.eval.metrics import make_metric\n"
            "print(make_metric('qa_f1_zh').compute(predictions=['港口'], references=[['港口']]))"
        )
        folders = {name: str(tmp_path) for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
        run = [sys.executable, "-P", "-B", "-c", code]
        environment = os.environ | folders
        result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == "{'qa_f1_zh': 100.0}\n"
        assert list(tmp_path.rglob("*")) == []


class TestStringMatch:
    @pytest.mark.parametrize(
        ("prediction", "references", "every", "some"),
        [
            ("It is 12 and 34.", ["12", "34"], 1, 1),
            ("It is 12.", ["12", "34"], 0.5, 1),
            ("It is 1 2.", ["12", "34"], 0, 0),
            ("HARROW island", ["Harrow Island"], 1, 1),
            ("\x00 harrow\x07", ["harrow"], 1, 1),
            ("one\ttwo", ["onetwo"], 0, 0),  # a control character still parts two words
            ("one\ttwo", ["one\ntwo"], 1, 1),
        ],
    )
    def test_hand_computed(self, prediction: str, references: list[str], every: float, some: float) -> None:
        assert score("string_match_all", prediction, *references) == every
        assert score("string_match_part", prediction, *references) == some

    @pytest.mark.parametrize("name", ["string_match_all", "string_match_part"])
    def test_an_empty_reference_would_always_match(self, name: str) -> None:
        with pytest.raises(ValueError, match="must not be empty"):
            score(name, "x", "x", "")


def overlap_f1(prediction: list[str], reference: list[str]) -> float:
    """F1 by striking each common word off a list."""
    left, common = list(reference), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


class TestTokenF1:
    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            ("The Grey Harbour!", "grey harbour", 1),
            ("grey", "the grey harbour", 2 / 3),  # precision 1, recall 1/2
            ("a grey grey cat", "grey grey dog cat", 6 / 7),  # 3 of 3, 3 of 4
            ("grey grey", "grey", 2 / 3),  # the second one is too many
            ("greyharbour", "grey harbour", 0),
            ("well-known", "wellknown", 1),  # punctuation goes without leaving a gap
            ("theatre an", "theatre", 1),  # articles only as whole words
            ("the", "the", 0),  # nothing is left to share
            ("“grey”", "grey", 0),  # SQuAD removes ASCII punctuation only
        ],
    )
    def test_english_hand_computed(self, prediction: str, reference: str, expected: float) -> None:
        assert score("qa_f1", prediction, reference) == pytest.approx(expected)

    def test_best_reference_counts(self) -> None:
        assert score("qa_f1", "three", "3", "three hearts", "three") == 1

    def test_chinese_words_are_cut_then_cleaned(self) -> None:
        assert segment("我爱北京天安门") == ["我", "爱", "北京", "天安门"]
        assert chinese_tokens("我 爱，北京ABC。") == ["我", "爱", "北京", "abc"]

    def test_chinese_hand_computed(self) -> None:
        # 我 爱 北京 against 我 爱 天安门: two of three words on both sides.
        assert score("qa_f1_zh", "我爱北京。", "我爱天安门") == pytest.approx(2 / 3)

    def test_chinese_punctuation_has_the_gaps_of_the_published_list(self) -> None:
        assert set("，。！？、；：“”‘’（）》【】…—～.") <= PUNCTUATION
        assert PUNCTUATION.isdisjoint("《〈．·A1港")
        assert len(PUNCTUATION) == 32 + 74  # ASCII and LongBench's own

    @given(*[st.lists(st.sampled_from(["a", "cat", "Dog.", "dog", "x-y", "1"]), max_size=8)] * 2)
    def test_agrees_with_striking_off(self, prediction: list[str], reference: list[str]) -> None:
        expected = overlap_f1(english_tokens(" ".join(prediction)), english_tokens(" ".join(reference)))
        assert score("qa_f1", " ".join(prediction), " ".join(reference)) == pytest.approx(expected)

    def test_unknown_language_is_named(self) -> None:
        with pytest.raises(ValueError, match="language must be one of en, zh, got 'de'"):
            TokenF1("de")


def longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(right) + 1)
    for item in left:
        previous = row
        row = [0]
        for column, other in enumerate(right):
            row.append(previous[column] + 1 if item == other else max(previous[column + 1], row[column]))
    return row[-1]


class TestRougeL:
    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            ("the cat sat", "the cat lay", 2 / 3),  # two of three words on both sides
            ("cat the", "the cat", 1 / 2),  # order counts
            ("The cat", "the cat", 1 / 2),  # case counts
            ("red red red", "red", 1),  # a repeated word counts once
            # Union over sentences: w1 w2 and w1 w3 w5 give 4 of 5 words; the answer has 8 different ones.
            ("w1 w2 w6 w7 w8.w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * (4 / 5 * 4 / 8) / (4 / 5 + 4 / 8)),
            (".", "the cat", 0),
            ("the cat", "..", 0),
        ],
    )
    def test_english_hand_computed(self, prediction: str, reference: str, expected: float) -> None:
        assert score("rouge_l", prediction, reference) == pytest.approx(expected, abs=1e-7)

    def test_chinese_is_compared_in_words(self) -> None:
        # 我 爱 北京 against 我 爱 天安门; as one unspaced text nothing would be common.
        assert score("rouge_l_zh", "我爱北京", "我爱天安门") == pytest.approx(2 / 3, abs=1e-7)
        assert score("rouge_l", "我爱北京", "我爱天安门") == 0

    @given(*[st.lists(st.integers(0, 30).map(str), min_size=1, max_size=12, unique=True)] * 2)
    def test_one_sentence_of_different_words_is_the_plain_definition(self, left: list[str], right: list[str]) -> None:
        common = longest_common(left, right)
        expected = 2 * common / (len(left) + len(right))
        assert score("rouge_l", " ".join(left), " ".join(right)) == pytest.approx(expected, abs=1e-7)

    def test_long_sentences_are_scored_although_the_package_runs_out_of_stack(self) -> None:
        words = [f"w{i}" for i in range(600)]
        prediction, reference = " ".join(words[:100] + ["x"] * 500), " ".join(words)
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(1000)
        try:
            # 100 of 600 words, of 101 different ones in the answer.
            assert score("rouge_l", prediction, reference) == pytest.approx(2 * 100 / (600 + 101), abs=1e-7)
            assert sys.getrecursionlimit() == 1000
            with pytest.raises(RecursionError):
                Rouge().get_scores(prediction, reference)
        finally:
            sys.setrecursionlimit(before)


def labels_walked(prediction: str, reference: str, labels: Sequence[str]) -> list[str]:
    """Removal from a list that is being walked: the position moves on although the list has become shorter."""
    found = [label for label in labels if label in prediction]
    position = 0
    while position < len(found):
        if found[position] in reference and found[position] != reference:
            del found[position]
        position += 1
    return found


class TestClassification:
    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            ("person", "person", 1),
            ("a person or a number", "person", 1 / 2),
            ("number", "person", 0),
            ("Person", "person", 0),  # case counts
            # "number" is a part of the right label and removed; "other", a part too, does not follow it.
            ("other number", "other number", 1),
            # "person" is named along with the right label, but so is no other.
            ("title of a person", "title of a person", 1),
            # The other way round the longer label is a wrong one.
            ("title of a person", "person", 1 / 2),
            ("", "person", 0),
        ],
    )
    def test_hand_computed(self, prediction: str, reference: str, expected: float) -> None:
        assert score("classification", prediction, reference) == expected

    def test_label_after_a_removed_one_is_passed_over_as_in_the_published_figures(self) -> None:
        metric, labels = make_metric("classification"), ["a", "ab", "abc"]
        assert metric.score("abc", ["abc"], all_classes=labels) == 1 / 2  # "ab" was never looked at
        assert metric.score("abc", ["abc"], all_classes=["a", "abc", "ab"]) == 1

    @given(st.lists(st.sampled_from(["a", "ab", "abc", "b", "bc", "c", "d"]), min_size=1, unique=True), st.data())
    @example(["a", "ab", "abc"], None)
    def test_agrees_with_walking_the_list(self, labels: list[str], data: st.DataObject | None) -> None:
        prediction = "abc" if data is None else data.draw(st.text("abcd ", max_size=6))
        for reference in labels:
            assert named_labels(prediction, reference, labels) == labels_walked(prediction, reference, labels)

    @pytest.mark.parametrize("classes", [None, []])
    def test_labels_are_needed(self, classes: list[str] | None) -> None:
        with pytest.raises(ValueError, match="expected the labels of the task"):
            make_metric("classification").score("person", ["person"], all_classes=classes)


class TestNumbers:
    @pytest.mark.parametrize(
        ("prediction", "expected"),
        [("Paragraph 7", 1), ("7 or 8", 1 / 2), ("It is 17", 0), ("07", 0), ("7, 7 and 3", 2 / 3), ("seven", 0)],
    )
    def test_share_of_the_right_number(self, prediction: str, expected: float) -> None:
        assert score("retrieval_en", prediction, "Paragraph 7") == pytest.approx(expected)
        assert score("retrieval_zh", prediction, "段落7") == pytest.approx(expected)
        assert score("count", prediction, "7") == pytest.approx(expected)

    def test_chinese_answer(self) -> None:
        assert score("retrieval_zh", "段落3。理由：段落4不合适", "段落3") == 1 / 2

    @pytest.mark.parametrize(("name", "wrong"), [("retrieval_en", "段落7"), ("retrieval_zh", "Paragraph 7")])
    def test_reference_without_a_number_is_named(self, name: str, wrong: str) -> None:
        with pytest.raises(ValueError, match=f"{name}: a reference must hold .* got '{wrong}'"):
            score(name, "7", wrong)


class TestEditSimilarity:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("return 1\nreturn 2", "return 1"),
            ("\n\n    return 1", "    return 1"),
            ("```python\n# first\n// second\nx = 1", "x = 1"),
            ("  \nx", "  "),  # only empty lines are skipped, not blank ones
            ("x = 1  # one", ""),
        ],
    )
    def test_first_line_of_code(self, text: str, line: str) -> None:
        assert first_code_line(text) == line

    @pytest.mark.parametrize(
        ("left", "right", "expected"),
        [
            ("abcd", "abed", 75),  # 2 x 3 of 8
            ("abc", "", 0),
            ("", "", 100),
            ("a", "aaaaa", 33),  # 2 x 1 of 6
            ("ab", "a" + "c" * 13, 12),  # 12.5 is rounded to even, as Python does
        ],
    )
    def test_hand_computed(self, left: str, right: str, expected: int) -> None:
        assert ratio(left, right) == ratio(right, left) == expected

    def test_only_the_first_line_of_code_counts(self) -> None:
        assert score("edit_similarity", "```\nabcd\nzzzz", "abed") == 0.75

    @given(*[st.text("abc (", max_size=12)] * 2)
    def test_is_twice_the_common_subsequence_over_both_lengths(self, left: str, right: str) -> None:
        total = len(left) + len(right)
        expected = round(100 * (2 * longest_common(left, right) / total)) if total else 100
        assert ratio(left, right) == expected

    @given(*[st.text("abc (", max_size=12)] * 2)
    def test_difflib_never_finds_more(self, left: str, right: str) -> None:
        assert round(100 * difflib.SequenceMatcher(None, left, right).ratio()) <= ratio(left, right)

    def test_agrees_with_difflib_where_one_line_is_a_part_of_the_other(self) -> None:
        rng = random.Random("edit similarity")
        for _ in range(100):
            line = "".join(rng.choice("selfcahkyi.()=, ") for _ in range(rng.randrange(1, 60)))
            part = line[: rng.randrange(1, len(line) + 1)]
            assert ratio(part, line) == round(100 * difflib.SequenceMatcher(None, part, line).ratio())

    def test_differs_from_difflib_where_blocks_cross(self) -> None:
        # difflib matches the longest block, "cd", and then has nothing left beside it; "a.b.e" is longer.
        left, right = "a1b2e3cd", "cda4b5e6"
        assert ratio(left, right) == 38  # 6 of 16
        assert round(100 * difflib.SequenceMatcher(None, left, right).ratio()) == 25  # 4 of 16


def test_metrics_are_evaluate_metrics() -> None:
    import evaluate

    for name in METRICS:
        metric = make_metric(name)
        assert isinstance(metric, SampleMetric)
        assert isinstance(metric, evaluate.Metric)
        assert metric.description
        assert metric.citation
    assert isinstance(make_metric("edit_similarity"), EditSimilarity)
