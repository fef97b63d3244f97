"""RULER: needles, variables and words, with answers found by slow references, and their scores."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruler_tokenizers import reference_samples, tokenizer_named

from pikv_hf.eval.tasks import ruler
from pikv_hf.eval.tasks.ruler import generate, score
from pikv_hf.eval.tasks.ruler.words import list_words, shuffled, vocabulary
from pikv_hf.eval.tasks.sample import EvalSample

NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
NIAH = [task for task in ruler.TASKS if task.startswith("niah")]


def needles_in(text: str) -> list[tuple[str, str]]:
    return [(key, value) for _, key, value in NEEDLE.findall(text)]


class TestNeedles:
    @pytest.mark.parametrize("task", NIAH)
    def test_answers_are_the_values_of_the_keys_asked_for(self, task: str) -> None:
        for sample in reference_samples(task):
            pairs = needles_in(sample.context)
            keys = re.split(r", and |, ", re.split(r" mentioned", sample.question.split(" for ")[1])[0])
            expected = [[value for key, value in pairs if key == asked] for asked in keys]
            assert sorted(sample.answers) == sorted(value for values in expected for value in values)
            if task != "niah_multivalue":
                assert list(sample.answers) == [value for values in expected for value in values]
            for answer in sample.answers:
                assert sample.context.count(answer) == 1

    @pytest.mark.parametrize(
        ("task", "needles", "answers"),
        [
            ("niah_single_1", 1, 1),
            ("niah_single_2", 1, 1),
            ("niah_single_3", 1, 1),
            ("niah_multikey_1", 4, 1),
            ("niah_multivalue", 4, 4),
            ("niah_multiquery", 4, 4),
        ],
    )
    def test_numbers_of_needles_and_answers(self, task: str, needles: int, answers: int) -> None:
        for sample in reference_samples(task):
            pairs = needles_in(sample.context)
            assert (len(pairs), len(sample.answers)) == (needles, answers)
            assert len({key for key, _ in pairs}) == (1 if task == "niah_multivalue" else needles)

    @pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", "number"), ("niah_multikey_3", "uuid")])
    def test_haystack_of_needles(self, task: str, kind: str) -> None:
        for sample in reference_samples(task):
            lines = sample.context.splitlines()[1:]
            assert all(NEEDLE.fullmatch(line) for line in lines[:-1])
            pairs = needles_in(sample.context)
            assert len(pairs) > 30
            assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == len(pairs)
            assert {found for found, _, _ in NEEDLE.findall(sample.context)} == {kind}

    def test_kinds_of_keys_and_values(self) -> None:
        for task in NIAH:
            for key, value in needles_in(reference_samples(task)[0].context):
                assert bool(UUID.fullmatch(key)) == (task == "niah_multikey_3")
                assert bool(UUID.fullmatch(value)) == (task in ("niah_single_3", "niah_multikey_3"))
                assert UUID.fullmatch(value) or re.fullmatch(r"[1-9]\d{6}", value)
                assert UUID.fullmatch(key) or re.fullmatch(r"\S+-\S+", key)

    def test_depth_is_the_share_of_the_haystack_before_the_needle(self) -> None:
        samples = generate(tokenizer_named("reference"), 2048, 60, tasks=["niah_single_2"])
        for sample in samples:
            needle = NEEDLE.search(sample.context)
            assert needle is not None
            share = needle.start() / (len(sample.context) - len(needle.group()))
            assert sample.extra["depth"] == pytest.approx(share, abs=0.12)
        assert min(s.extra["depth"] for s in samples) < 0.1
        assert max(s.extra["depth"] for s in samples) > 0.9

    def test_depths_of_several_needles_ascend_with_their_places(self) -> None:
        for sample in reference_samples("niah_multiquery"):
            by_depth = [value for _, value in sorted(zip(sample.extra["depths"], sample.answers, strict=True))]
            assert by_depth == sorted(sample.answers, key=sample.context.index)

    def test_noise(self) -> None:
        for sample in reference_samples("niah_single_1"):
            lines = [line for line in sample.context.splitlines()[1:] if not NEEDLE.fullmatch(line)]
            noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
            assert set(lines[:-1]) == {noise}
            assert noise.startswith(lines[-1])

    def test_wording_for_one_uuid_and_for_several_numbers(self) -> None:
        one, several = reference_samples("niah_single_3")[0], reference_samples("niah_multivalue")[0]
        key = needles_in(one.context)[0][0]
        assert one.context.startswith(
            "A special magic uuid is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the uuid afterwards.\n"
        )
        assert one.question == f"What is the special magic uuid for {key} mentioned in the provided text?"
        assert one.answer_prefix == f"The special magic uuid for {key} mentioned in the provided text is"
        assert several.context.startswith("Some special magic numbers are hidden within the following text.")
        assert several.question.startswith("What are all the special magic numbers for ")


def chain_variables(context: str, value: str) -> list[str]:
    """All variables that have `value`, found by running every assignment as often as it takes."""
    body = context.rsplit("Memorize and track", 1)[1]
    assignments = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", body)
    known: dict[str, str] = {}
    for _ in assignments:
        for name, source in assignments:
            known[name] = source if source.isdigit() else known.get(source, "")
    return [name for name, held in known.items() if held == value]


class TestVariables:
    def test_slow_interpreter_finds_the_answers(self) -> None:
        for sample in reference_samples("vt"):
            value = re.findall(r"value (\d{5}) in", sample.question)[0]
            assert chain_variables(sample.context, value) == list(sample.answers)
            assert len(set(sample.answers)) == 5
            assert all(re.fullmatch("[A-Z]{5}", name) for name in sample.answers)

    def test_each_assignment_comes_after_the_one_it_uses(self) -> None:
        for sample in reference_samples("vt"):
            places = [sample.context.index(f"VAR {name} = ") for name in sample.answers]
            assert places == sorted(places)

    def test_example_is_answered_and_short(self) -> None:
        tokenizer = tokenizer_named("reference")
        for sample in reference_samples("vt"):
            example, rest = sample.context.split("\n\nMemorize and track")
            assert rest.startswith(" the chain(s) of variable assignment hidden in the following text.\n\n")
            asked, answer = example.split("they are: ")
            value = re.findall(r"value (\d{5}),", asked)[0]
            assert chain_variables(example, value) == answer.split()
            assert 350 < len(tokenizer(example)["input_ids"]) <= 470


class TestWords:
    @pytest.mark.parametrize(("length", "common", "uncommon"), [(4095, 6, 1), (4096, 30, 3)])
    def test_common_words_by_counting(self, length: int, common: int, uncommon: int) -> None:
        for sample in reference_samples("cwe", length):
            listing = sample.context.rsplit("appear most often.\n", 1)[1]
            found = re.findall(r"(\d+)\. (\S+)", listing)
            assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
            counted = Counter(word for _, word in found)
            assert {word for word, _ in counted.most_common(10)} == set(sample.answers)
            assert sorted(set(counted.values())) == [uncommon, common]
            assert list(counted.values()).count(common) == 10

    def test_example_of_common_words(self) -> None:
        for length, most, least, words in ((2048, 3, 1, 20), (4096, 10, 3, 40)):
            example = reference_samples("cwe", length)[0].context.split("\nBelow is")[0]
            listing, answer = example.split("\nQuestion: ")
            counted = Counter(re.findall(r"\d+\. (\S+)", listing))
            assert len(counted) == words
            assert sorted(set(counted.values())) == [least, most]
            assert {word for word, _ in counted.most_common(10)} == set(re.findall(r"\d+\. (\S+)", answer))

    @pytest.mark.parametrize("length", [1024, 4096])
    def test_frequent_words_by_counting(self, length: int) -> None:
        for sample in reference_samples("fwe", length):
            coded = sample.context.split("coded words. ")[1].split()
            counted = Counter(coded).most_common()
            assert counted[0][0] == "..."
            assert tuple(word for word, _ in counted[1:4]) == sample.answers
            assert counted[3][1] > counted[4][1]
            assert len(counted) <= length // 50
            assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counted[1:])
            assert [count for _, count in counted[:4]] == sample.extra["counts"]

    def test_frequencies_follow_the_zeta_distribution(self) -> None:
        counted = Counter(reference_samples("fwe")[0].context.split("coded words. ")[1].split())
        first, second, third = (count for _, count in counted.most_common(3))
        assert first / second == pytest.approx(4, rel=0.02)
        assert first / third == pytest.approx(9, rel=0.05)

    def test_word_lists_hold_no_spaces_or_repeats(self) -> None:
        assert len(vocabulary()) == len(set(vocabulary())) > 7000
        assert not [word for word in vocabulary() if not word or " " in word]

    def test_words_do_not_repeat_after_the_vocabulary(self) -> None:
        source = list_words(random.Random(0))
        words = [next(source) for _ in range(len(vocabulary()) + 500)]
        assert len(set(words)) == len(words)
        assert set(words[: len(vocabulary())]) == set(vocabulary())

    @given(st.integers(0, 200), st.integers())
    def test_shuffled_is_a_permutation(self, count: int, seed: int) -> None:
        assert sorted(shuffled(random.Random(seed), count)) == list(range(count))


class TestScore:
    @pytest.mark.parametrize(
        ("task", "answers", "prediction", "expected"),
        [
            ("niah_multivalue", ("123", "456", "789", "555"), "They are 123, 456 and 789.", 0.75),
            ("vt", ("ABC", "DEF"), "abc def", 1.0),
            ("vt", ("ABC", "DEF"), "", 0.0),
            ("qa_1", ("Ann Lee", "Lee"), "It was LEE.", 1.0),
            ("qa_2", ("Ann Lee", "Bo"), "Ann", 0.0),
            ("cwe", ("tea", "milk"), "1. tea\n2. mi\x00lk", 0.5),
            ("fwe", ("red car",), "red\ncar", 0.0),
        ],
    )
    def test_by_hand(self, task: str, answers: tuple[str, ...], prediction: str, expected: float) -> None:
        sample = EvalSample(f"{task}-0000", task, "", "", "", answers, 30, 4096)
        assert score(sample, prediction) == {"string_match": expected}

    def test_right_answers_score_1(self) -> None:
        for task in ruler.TASKS:
            sample = reference_samples(task)[0]
            assert score(sample, " ".join(sample.answers)) == {"string_match": 1.0}
            assert score(sample, "nothing of the kind") == {"string_match": 0.0}
