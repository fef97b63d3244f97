"""The synthetic retrieval text: reproducible, of the length asked for, in RULER's wording, and answerable."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.eval.reference.synthetic import (
    HAYSTACKS,
    TASKS,
    count_tokens,
    make_sample,
    make_shared_samples,
    tasks,
    text,
)
from pikv_hf.eval.reference.synthetic.words import FILLERS, KEYS
from pikv_hf.eval.reference.tokenizer import DIGITS, PUNCTUATION, build_tokenizer, vocabulary

TOKENIZER = build_tokenizer()
CASES = [(task, haystack) for task in TASKS for haystack in HAYSTACKS]


def token_ids(string: str) -> list[int]:
    return TOKENIZER(string, add_special_tokens=False)["input_ids"]


class TestWords:
    def test_lists_are_disjoint_and_without_repeats(self) -> None:
        words = [*KEYS, *FILLERS]
        assert len(words) == len(set(words))

    def test_key_pool_can_double_from_8_to_all(self) -> None:
        assert len(KEYS) == 256


class TestTokenizer:
    def test_ids_are_dense_and_special_tokens_come_first(self) -> None:
        assert sorted(vocabulary().values()) == list(range(len(vocabulary())))
        special = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id]
        assert special == [0, 1, 2, 3]

    def test_one_token_per_digit_word_and_newline(self) -> None:
        assert TOKENIZER.convert_ids_to_tokens(token_ids("VAR apple = 1234.\n")) == [
            *("VAR", "apple", "=", "1", "2", "3", "4", ".", "\n")
        ]

    def test_call_adds_bos_and_continuation_does_not(self) -> None:
        assert TOKENIZER("apple")["input_ids"] == [TOKENIZER.bos_token_id, *token_ids("apple")]

    @given(st.lists(st.sampled_from(sorted(set(vocabulary()) - {"<unk>"})), max_size=40))
    @settings(max_examples=200, deadline=None)
    def test_ids_survive_text(self, tokens: list[str]) -> None:
        ids = TOKENIZER.convert_tokens_to_ids(tokens)
        assert token_ids(TOKENIZER.decode(ids)) == ids

    @given(st.lists(st.sampled_from([*KEYS, *FILLERS, *DIGITS, *PUNCTUATION, "\n"]), max_size=40))
    @settings(max_examples=100, deadline=None)
    def test_count_tokens_agrees(self, tokens: list[str]) -> None:
        string = " ".join(tokens)
        assert count_tokens(string) == len(token_ids(string))


class TestSamples:
    @pytest.mark.parametrize(("task", "haystack"), CASES)
    def test_seed_fixes_the_text(self, task: str, haystack: str) -> None:
        one, same, other = (make_sample(task, 512, random.Random(seed), haystack) for seed in (1, 1, 2))
        assert one == same
        assert one != other

    @pytest.mark.parametrize("n_tokens", [256, 1024])
    @pytest.mark.parametrize(("task", "haystack"), CASES)
    def test_length_is_at_most_one_sentence_short(self, task: str, haystack: str, n_tokens: int) -> None:
        sample = make_sample(task, n_tokens, random.Random(0), haystack)
        length = len(TOKENIZER(f"{sample.prompt} {sample.answer}.<eos>")["input_ids"])
        assert n_tokens - 16 <= length <= n_tokens

    @pytest.mark.parametrize(("task", "haystack"), CASES)
    def test_prompt_is_known_and_readable(self, task: str, haystack: str) -> None:
        sample = make_sample(task, 512, random.Random(3), haystack)
        ids = token_ids(f"{sample.prompt} {sample.answer}.<eos>")
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == f"{sample.prompt} {sample.answer}.<eos>"

    @pytest.mark.parametrize(("task", "haystack"), CASES)
    def test_context_and_question_encode_separately(self, task: str, haystack: str) -> None:
        sample = make_sample(task, 512, random.Random(4), haystack)
        parts = token_ids(sample.context) + token_ids(f"{sample.question}\n{sample.answer_prefix}")
        assert parts == token_ids(sample.prompt)

    @pytest.mark.parametrize(("task", "haystack"), CASES)
    def test_answer_is_in_the_context(self, task: str, haystack: str) -> None:
        sample = make_sample(task, 512, random.Random(5), haystack)
        assert all(reference in sample.context and reference in sample.answer for reference in sample.answers)
        assert sample.exact(f" {sample.answer}.")
        assert sample.string_match(sample.answer) == 1.0
        assert sample.string_match("nothing") == 0.0

    def test_multivalue_lists_values_in_order_of_appearance(self) -> None:
        sample = make_sample("multivalue", 512, random.Random(6))
        places = [sample.context.index(value) for value in sample.answer.split(", ")]
        assert places == sorted(places)
        assert len(places) == 4

    def test_vt_answer_walks_the_chain_back_to_its_value(self) -> None:
        sample = make_sample("vt", 512, random.Random(7), "noise")
        *aliases, value = f"{sample.answer_prefix} {sample.answer}".split(" = ")
        assert len(aliases) == 5
        for variable, source in zip(aliases, [*aliases[1:], value], strict=True):
            assert f"{variable} = {source}." in sample.context

    def test_needles_of_other_keys_do_not_answer(self) -> None:
        sample = make_sample("multikey", 1024, random.Random(8), "needles")
        key = sample.question.split(" for ")[1].split()[0]
        assert sample.context.count(f"for {key} is:") == 1
        assert sample.context.count(sample.answer) == 1

    def test_rulers_wording(self) -> None:
        sample = make_sample("multiquery", 512, random.Random(9))
        keys = [pair.split(":")[0] for pair in sample.answer.split(", ")]
        listed = f"{keys[0]}, {keys[1]}, {keys[2]}, and {keys[3]}"
        assert sample.question == f"What are all the special magic numbers for {listed} mentioned in the provided text?"
        assert sample.answer_prefix == f"The special magic numbers for {listed} mentioned in the provided text are"
        assert f"One of the special magic numbers for {keys[0]} is: {sample.answers[0]}." in sample.context
        assert sample.context.startswith(
            "Some special magic numbers are hidden within the following text. Make sure to"
        )

    def test_shared_haystack(self) -> None:
        samples = make_shared_samples(2048, random.Random(0), needles=8, questions=6)
        assert len({sample.context for sample in samples}) == 1
        assert len({sample.question for sample in samples}) == 6
        assert [sample.task for sample in samples] == ["multikey"] * 5 + ["multiquery"]
        assert all(reference in sample.context for sample in samples for reference in sample.answers)

    def test_wrong_requests_are_refused(self) -> None:
        rng = random.Random(0)
        with pytest.raises(ValueError, match="unknown task 'fwe'"):
            make_sample("fwe", 512, rng)
        with pytest.raises(ValueError, match="unknown haystack 'paul'"):
            make_sample("single", 512, rng, "paul")
        with pytest.raises(ValueError, match="more than the 64 asked for"):
            make_sample("multiquery", 64, rng)
        with pytest.raises(ValueError, match="at least 8 needles, got 4"):
            make_shared_samples(512, rng, needles=4, questions=9)


def test_statements_keep_their_order_in_the_haystack() -> None:
    rng = random.Random(0)
    plan = tasks.plan_variables(rng, hops=(4, 4, 2), rounds=3)
    context = tasks.hide(plan, 1024, rng, "essay").context
    places = [context.index(statement) for statement in plan.statements]
    assert places == sorted(places)


def test_noise_is_rulers() -> None:
    sample = make_sample("single", 512, random.Random(0), "noise")
    assert " ".join(text.NOISE_SENTENCES) in sample.context
