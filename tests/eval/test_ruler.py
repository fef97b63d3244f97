"""The RULER generator: lengths with three kinds of tokenizer, answers by slow references, files and errors."""

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.pipeline import KVPressTextGenerationPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pikv_hf.eval.reference.load import reference_model_path
from pikv_hf.eval.tasks import ruler
from pikv_hf.eval.tasks.ruler import Haystack, generate, load_hub, score
from pikv_hf.eval.tasks.ruler.counting import Prompt, TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem, TooShortError, fit
from pikv_hf.eval.tasks.ruler.haystack import data_folder, split_sentences
from pikv_hf.eval.tasks.ruler.question_sets import read_hotpotqa, read_squad
from pikv_hf.eval.tasks.ruler.words import list_words, shuffled, vocabulary
from pikv_hf.eval.tasks.sample import EvalSample

CHAT = (
    "{{ bos_token }}{% for message in messages %}<user>\n{{ message['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<model>\n{% endif %}"
)
NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
NIAH = [task for task in ruler.TASKS if task.startswith("niah")]
TOKENIZERS = ("reference", "bpe", "unigram")


def training_text() -> list[str]:
    return [*Haystack.bundled().sentences, *vocabulary()]


def train_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, like the tokenizers of Llama 3 or Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    wrapped.chat_template = CHAT
    return wrapped


def train_unigram() -> PreTrainedTokenizerFast:
    """Unigram pieces that begin with a visible space, like SentencePiece's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@cache
def tokenizer_named(name: str) -> Any:
    if name == "reference":
        return AutoTokenizer.from_pretrained(reference_model_path(), local_files_only=True)
    return train_bpe() if name == "bpe" else train_unigram()


@cache
def reference_samples(task: str, length: int = 4096, samples: int = 12) -> list[EvalSample]:
    return generate(tokenizer_named("reference"), length, samples, tasks=[task])


def pipeline_tokens(tokenizer: Any, sample: EvalSample) -> int:
    """Tokens of a prompt as kvpress's own code makes them."""
    holder = SimpleNamespace(tokenizer=tokenizer)
    made = KVPressTextGenerationPipeline.preprocess(
        holder, sample.context, [sample.question], sample.answer_prefix, 10**9
    )
    return int(made["context_ids"].shape[1] + made["questions_ids"][0].shape[1])


class TestLengths:
    @pytest.mark.parametrize("length", [1024, 1500, 4096])
    @pytest.mark.parametrize("task", ruler.TASKS)
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_every_sample_fills_98_to_100_per_cent(self, name: str, task: str, length: int) -> None:
        tokenizer = tokenizer_named(name)
        for sample in generate(tokenizer, length, 8, tasks=[task]):
            tokens = pipeline_tokens(tokenizer, sample) + sample.max_new_tokens
            assert 0.98 * length <= tokens <= length

    @pytest.mark.parametrize("name", ["reference", "bpe"])
    def test_one_sample_of_each_task_at_32768(self, name: str) -> None:
        tokenizer = tokenizer_named(name)
        for sample in generate(tokenizer, 32_768, 1):
            tokens = pipeline_tokens(tokenizer, sample) + sample.max_new_tokens
            assert 0.98 * 32_768 <= tokens <= 32_768

    def test_longest_list_of_words_goes_on_with_compounds(self) -> None:
        [sample] = generate(tokenizer_named("reference"), 196_608, 1, tasks=["cwe"])
        tokens = pipeline_tokens(tokenizer_named("reference"), sample) + sample.max_new_tokens
        assert 0.98 * 196_608 <= tokens <= 196_608
        words = set(re.findall(r"\d+\. (\S+)", sample.context))
        assert len(words) > len(vocabulary())
        assert any("-" in word for word in words - set(vocabulary()))

    @pytest.mark.parametrize("task", [task for task in ruler.TASKS if task not in ("cwe", "fwe")])
    def test_short_lengths(self, task: str) -> None:
        tokenizer = tokenizer_named("reference")
        for sample in generate(tokenizer, 512, 8, tasks=[task]):
            tokens = pipeline_tokens(tokenizer, sample) + sample.max_new_tokens
            assert 0.97 * 512 <= tokens <= 512

    @pytest.mark.parametrize("task", ruler.TASKS)
    def test_too_short(self, task: str) -> None:
        tokenizer = tokenizer_named("reference")
        pattern = rf"length 100 is too small for {task}: the least that fits is (\d+) tokens"
        with pytest.raises(ValueError, match=pattern) as caught:
            generate(tokenizer, 100, 1, tasks=[task])
        least = int(str(caught.value).split()[-2])
        # Words and examples differ from length to length, so a tenth more is given.
        [sample] = generate(tokenizer, int(1.1 * least) + 20, 1, tasks=[task])
        assert sample.task == task

    def test_chat_template_is_counted(self) -> None:
        counter, tokenizer = TokenCounter(tokenizer_named("bpe")), tokenizer_named("bpe")
        sample = generate(tokenizer, 1024, 1, tasks=["vt"])[0]
        prompt = Prompt(sample.context, sample.question, sample.answer_prefix)
        counted = counter.context_lengths([prompt])[0] + counter.question_lengths([prompt])[0]
        assert counted == pipeline_tokens(tokenizer, sample)
        plain = len(tokenizer(sample.context, add_special_tokens=False)["input_ids"])
        assert pipeline_tokens(tokenizer, sample) > plain + len(tokenizer("<user>\n<end>\n<model>\n")["input_ids"]) - 8

    def test_tokenizer_that_pads_and_truncates_is_counted_without(self) -> None:
        tokenizer = train_unigram()
        before = TokenCounter(tokenizer).lengths(["One two three four.", "Five."])
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        assert TokenCounter(tokenizer).lengths(["One two three four.", "Five."]) == before


@dataclasses.dataclass(frozen=True)
class Words:
    """A draft of one-letter words whose estimate is off by any amount."""

    units: tuple[int, ...]
    error: float
    least: int = 0

    @property
    def largest(self) -> int:
        return len(self.units)

    def cost(self, size: int) -> int:
        return int(self.error * sum(self.units[:size]))

    def tail(self, size: int, room: int) -> tuple[str, int]:
        count = max(0, min(int(room / self.error), 40))
        return " ".join("z" * count), int(self.error * count)

    def context(self, size: int, tail: str) -> str:
        return " ".join(["a" * sum(self.units[:size]), tail]).replace("a", "a ")

    def extra(self, size: int) -> dict[str, Any]:
        return {"size": size}


class TestFitting:
    @given(
        st.lists(st.integers(1, 30), min_size=40, max_size=80),
        st.floats(0.5, 1.6),
        st.integers(300, 500),
        st.integers(0, 20),
    )
    @settings(max_examples=150, deadline=None)
    def test_never_too_long_and_filled_however_wrong_the_estimate(
        self, units: list[int], error: float, length: int, answer: int
    ) -> None:
        counter: Any = SimpleNamespace(
            context_lengths=lambda prompts: [len(p.context.split()) for p in prompts],
            question_lengths=lambda prompts: [len(p.question.split()) for p in prompts],
        )
        [fitted] = fit([Problem(Words(tuple(units), error), "q q", "", ())], counter, length, answer)
        tokens = len(fitted.prompt.context.split()) + 2 + answer
        assert tokens == fitted.tokens <= length
        if sum(units) >= length:
            assert fitted.tokens >= 0.98 * length

    def test_missing_tokens_are_those_of_the_longest(self) -> None:
        counter: Any = SimpleNamespace(
            context_lengths=lambda prompts: [len(p.context.split()) for p in prompts],
            question_lengths=lambda prompts: [0 for _ in prompts],
        )
        problems = [Problem(Words((size,), 1.0, least=1), "", "", ()) for size in (30, 50)]
        with pytest.raises(TooShortError) as caught:
            fit(problems, counter, 25, 5)
        assert caught.value.missing == 30


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


def documents_in(sample: EvalSample) -> list[str]:
    body = sample.context.split("The following are given documents.\n\n")[1]
    documents = re.split(r"Document (\d+):\n", body)
    assert [int(number) for number in documents[1::2]] == list(range(1, len(documents) // 2 + 1))
    return [document.strip() for document in documents[2::2]]


class TestQuestionAnswering:
    @pytest.mark.parametrize("length", [1024, 8192])
    def test_only_the_paragraph_holds_the_answer(self, length: int) -> None:
        questions = {question.text: question for question in read_squad(data_folder() / "squad.json").questions}
        texts = read_squad(data_folder() / "squad.json").documents
        for sample in reference_samples("qa_1", length):
            [gold] = questions[sample.question.split("Question: ")[1]].gold
            found = documents_in(sample)
            pattern = re.compile(rf"\b{re.escape(sample.answers[0])}\b", re.IGNORECASE)
            assert [document for document in found if pattern.search(document)] == [texts[gold].strip()]

    @pytest.mark.parametrize("length", [1024, 8192])
    def test_both_documents_of_a_two_hop_question_are_given(self, length: int) -> None:
        known = read_hotpotqa(data_folder() / "hotpotqa.json")
        questions = {question.text: question for question in known.questions}
        for sample in reference_samples("qa_2", length):
            question = questions[sample.question.split("Question: ")[1]]
            found = documents_in(sample)
            gold = [known.documents[number] for number in question.gold]
            assert len(gold) == 2
            assert all(found.count(document) == 1 for document in gold)
            for answer in set(sample.answers) - {"yes", "no"}:
                others = [document for document in found if document not in gold]
                assert not [text for text in others if re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE)]

    def test_near_documents_come_first(self) -> None:
        known = read_squad(data_folder() / "squad.json")
        questions = {question.text: question for question in known.questions}
        for sample in reference_samples("qa_1", 1024):
            question = questions[sample.question.split("Question: ")[1]]
            answered = re.compile(rf"\b{re.escape(sample.answers[0])}\b", re.IGNORECASE)
            near = [known.documents[number] for number in question.near]
            assert all(text in sample.context for text in near if not answered.search(text))

    def test_documents_do_not_repeat_before_the_haystack_does(self) -> None:
        for sample in reference_samples("qa_1", 8192):
            found = documents_in(sample)
            assert len(found) == len(set(found))
            assert sample.extra["documents"] in (len(found), len(found) - 1)

    def test_all_questions_are_asked_before_one_is_asked_again(self) -> None:
        count = len(read_hotpotqa(data_folder() / "hotpotqa.json").questions)
        samples = generate(tokenizer_named("reference"), 1024, 2 * count, tasks=["qa_2"])
        asked = [sample.question for sample in samples]
        assert len(set(asked[:count])) == count
        assert asked[:count] == asked[count:]

    def test_one_question_about_one_document_cannot_be_asked_twice(self, tmp_path: Path) -> None:
        paragraph = "Vell is a town of tin. " * 20
        file = write_squad(tmp_path, paragraph, "Of what is Vell?", "tin")
        alone = Haystack(("Of the tin.",))
        with pytest.raises(ValueError, match=r"qa_1: 1 different samples of 400 tokens can be made, not more"):
            generate(tokenizer_named("reference"), 400, 2, tasks=["qa_1"], squad=file, haystack=alone)

    def test_bundled_sets_are_large_enough_and_consistent(self) -> None:
        squad, hotpot = read_squad(data_folder() / "squad.json"), read_hotpotqa(data_folder() / "hotpotqa.json")
        assert (len(squad.questions), len(squad.documents)) == (83, 32)
        assert (len(hotpot.questions), len(hotpot.documents)) == (45, 45)
        entries = json.loads((data_folder() / "hotpotqa.json").read_text())
        assert {entry["type"] for entry in entries} == {"bridge", "comparison"}
        for entry in entries:
            sentences = dict(entry["context"])
            assert all(sentences[title][index] for title, index in entry["supporting_facts"])
        for article in json.loads((data_folder() / "squad.json").read_text())["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    for answer in question["answers"]:
                        assert paragraph["context"][answer["answer_start"] :].startswith(answer["text"])


def write_squad(folder: Path, paragraph: str, asked: str, right: str, **changes: Any) -> Path:
    entry = {"id": "1", "question": asked, "is_impossible": False, "answers": [{"text": right}], **changes}
    kept = {field: value for field, value in entry.items() if value is not None}
    file = folder / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": paragraph, "qas": [kept]}]}]}))
    return file


def write_hotpot(folder: Path, **changes: Any) -> Path:
    entry = {
        "_id": "1",
        "question": "Who built the ship that Bo sailed?",
        "answer": "Ann",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [["Bo", 0], ["Swan", 0]],
        "context": [
            ["Bo", ["Bo sailed the Swan."]],
            ["Far", ["Far is far."]],
            ["Swan", ["It is old.", " Ann built it."]],
        ],
        **changes,
    }
    file = folder / "hotpot.json"
    file.write_text(json.dumps([{field: value for field, value in entry.items() if value is not None}]))
    return file


class TestReaders:
    def test_squad(self, tmp_path: Path) -> None:
        questions = [
            {"question": "Who?", "is_impossible": False, "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "An"}]},
            {"question": "Why?", "is_impossible": True, "answers": []},
        ]
        paragraphs = [{"context": "Ann did.", "qas": questions}, {"context": "Bo did not.", "qas": []}]
        file = tmp_path / "set.json"
        file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
        found = read_squad(file)
        assert found.documents == ("Ann did.", "Bo did not.")
        [question] = found.questions
        assert (question.text, question.answers, question.gold, question.near) == ("Who?", ("Ann", "An"), (0,), (1,))

    def test_hotpotqa(self, tmp_path: Path) -> None:
        found = read_hotpotqa(write_hotpot(tmp_path))
        assert found.documents == ("Bo\nBo sailed the Swan.", "Far\nFar is far.", "Swan\nIt is old. Ann built it.")
        [question] = found.questions
        assert (question.answers, question.gold, question.near) == (("Ann",), (0, 2), (1,))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"question": None}, r"squad.json: data\[0\].paragraphs\[0\].qas\[0\]: field 'question' is missing"),
            ({"is_impossible": None}, r"qas\[0\]: field 'is_impossible' is missing, found id, question, answers"),
            ({"answers": []}, r"qas\[0\].answers: expected at least one answer, found none"),
            ({"answers": [{"text": ""}]}, r"answers\[0\].text: expected a text, found an empty one"),
            ({"answers": "Ann"}, r"qas\[0\].answers: expected a list, found 'Ann'"),
            ({"answers": [{"text": "Bo"}]}, r"expected a part of the paragraph, found 'Bo'"),
            ({"is_impossible": True}, r"squad.json: expected at least one question with an answer, found none"),
        ],
    )
    def test_wrong_squad(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        file = write_squad(tmp_path, "Ann did.", "Who?", "Ann", **changes)
        with pytest.raises(ValueError, match=message):
            read_squad(file)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"answer": None}, r"hotpot.json: entry \[0\]: field 'answer' is missing"),
            ({"supporting_facts": [["Sea", 0]]}, r"supporting_facts: 'Sea' is not among the titles of the context"),
            ({"supporting_facts": [["Bo"]]}, r"supporting_facts\[0\]: expected a list of two, found 1 items"),
            ({"context": {"Bo": []}}, r"\[0\].context: expected a list, found an object"),
            ({"question": 7}, r"\[0\].question: expected a text, found 7"),
        ],
    )
    def test_wrong_hotpotqa(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_hotpotqa(write_hotpot(tmp_path, **changes))

    @pytest.mark.parametrize("read", [read_squad, read_hotpotqa])
    def test_files_that_are_none(self, read: Callable[[Path], object], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"question set .*none.json: no such file"):
            read(tmp_path / "none.json")
        broken = tmp_path / "broken.json"
        broken.write_text('{\n"data": [}')
        with pytest.raises(ValueError, match=r"broken.json, line 2: expected JSON"):
            read(broken)
        broken.write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(ValueError, match=r"broken.json: cannot be read as UTF-8 text"):
            read(broken)

    def test_own_files_are_used(self, tmp_path: Path) -> None:
        file = write_hotpot(tmp_path)
        [sample] = generate(tokenizer_named("reference"), 1024, 1, tasks=["qa_2"], hotpotqa=file)
        assert sample.answers == ("Ann",)
        assert sample.question.endswith("Question: Who built the ship that Bo sailed?")


class TestHaystack:
    def test_bundled_essays(self) -> None:
        assert len(list(data_folder().glob("essay_*.txt"))) == 18
        assert len(Haystack.bundled().text.split()) > 12_000
        assert not re.search(r"magic (number|uuid)|VAR ", Haystack.bundled().text)

    def test_folder_is_read_in_order_of_names(self, tmp_path: Path) -> None:
        for name, text in (("b.txt", "Third one."), ("a.md", "First one.\n\nSecond\none."), ("c.csv", "No.")):
            (tmp_path / name).write_text(text)
        assert Haystack.read(tmp_path).sentences == ("First one.", "Second one.", "Third one.")
        assert Haystack.read(tmp_path / "c.csv").sentences == ("No.",)

    def test_wrong_files(self, tmp_path: Path) -> None:
        file = tmp_path / "text.txt"
        with pytest.raises(FileNotFoundError, match=r"text.txt: no such file or folder"):
            Haystack.read(file)
        with pytest.raises(FileNotFoundError, match=r"no file ending in .txt or .md"):
            Haystack.read(tmp_path)
        file.write_text(" \n")
        with pytest.raises(ValueError, match=r"text.txt: the file is empty"):
            Haystack.read(file)
        file.write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"text.txt: expected UTF-8, found byte 0xe9"):
            Haystack.read(tmp_path)
        file.write_text("Fine.\nOne of the special magic\nnumbers for a is: 1.")
        with pytest.raises(ValueError, match=r"text.txt, line 2: .* reads like a needle"):
            Haystack.read(file)
        with pytest.raises(ValueError, match=r"at least one sentence"):
            Haystack(())

    @given(st.text(alphabet="aB1 .!?\n\"')", max_size=80))
    @settings(max_examples=200, deadline=None)
    def test_splitting_loses_nothing(self, text: str) -> None:
        sentences = split_sentences(text)
        assert " ".join(sentences).split() == text.split()
        assert all(sentence.strip() == sentence != "" for sentence in sentences)

    def test_sentences(self) -> None:
        text = 'He left. "Why?" she asked. "Go!" He went (in 1902). 3 came back.'
        assert split_sentences(text) == ["He left.", '"Why?" she asked.', '"Go!"', "He went (in 1902).", "3 came back."]

    def test_heading_is_no_part_of_the_first_sentence(self) -> None:
        assert split_sentences("On Tea\n\nTea is\nhot. It\n \nCools.") == ["On Tea", "Tea is hot.", "It", "Cools."]

    def test_passages_follow_one_another(self) -> None:
        haystack = Haystack(tuple(f"S{number}." for number in range(40)))
        source = haystack.documents(random.Random(3))
        passages = [next(source).split() for _ in range(4)]
        read = [sentence for passage in passages for sentence in passage]
        start = haystack.sentences.index(read[0])
        assert read == [haystack.sentences[(start + step) % 40] for step in range(len(read))]
        assert all(5 <= len(passage) <= 9 for passage in passages)

    def test_sample_reads_on_from_a_sentence_and_wraps_around(self) -> None:
        haystack = Haystack(("Ann.", "Bo.", "Cy."))
        starts = set()
        for seed in range(20):
            source = haystack.from_random(random.Random(seed))
            read = [next(source) for _ in range(7)]
            start = haystack.sentences.index(read[0])
            assert read == [haystack.sentences[(start + step) % 3] for step in range(7)]
            starts.add(start)
        assert starts == {0, 1, 2}

    def test_own_haystack_is_used(self) -> None:
        haystack = Haystack(tuple(f"Sentence {number} is here." for number in range(50)))
        [sample] = generate(tokenizer_named("reference"), 1024, 1, tasks=["niah_single_2"], haystack=haystack)
        assert "Sentence 7 is here. Sentence 8 is here." in sample.context


class TestRun:
    def test_ids_limits_and_lengths(self) -> None:
        samples = generate(tokenizer_named("reference"), 1024, 2)
        assert [sample.id for sample in samples] == [f"{task}-{n:04d}" for task in ruler.TASKS for n in range(2)]
        limits = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
        assert all(sample.max_new_tokens == limits[sample.task.split("_")[0]] for sample in samples)
        assert {sample.length for sample in samples} == {1024}
        assert len(ruler.TASKS) == len(set(ruler.TASKS)) == 13
        assert json.loads(json.dumps([dict(sample.extra) for sample in samples]))

    def test_seed_fixes_samples_whatever_else_is_asked_for(self) -> None:
        tokenizer = tokenizer_named("reference")
        everything = generate(tokenizer, 1024, 3, seed=5)
        for task in ("niah_multikey_3", "vt", "cwe", "fwe", "qa_2"):
            wanted = [sample for sample in everything if sample.task == task]
            assert generate(tokenizer, 1024, 3, seed=5, tasks=[task]) == wanted
            assert generate(tokenizer, 1024, 2, seed=5, tasks=[task]) == wanted[:2]
            others = generate(tokenizer, 1024, 3, seed=6, tasks=[task])
            assert not {sample.context for sample in others} & {sample.context for sample in wanted}

    def test_no_two_samples_are_alike(self) -> None:
        samples = generate(tokenizer_named("reference"), 1024, 100)
        assert len({(sample.context, sample.question) for sample in samples}) == len(samples) == 1300

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tasks": ["niah_singel_1"]}, r"unknown RULER task 'niah_singel_1', did you mean 'niah_single_1'\?"),
            ({"tasks": ["poetry"]}, r"unknown RULER task 'poetry', expected one of niah_single_1, "),
            ({"tasks": ["vt", "vt"]}, r"RULER task 'vt' is given 2 times, expected once"),
            ({"samples": 0}, r"samples must be at least 1, got 0"),
            ({"length": -1}, r"length must be at least 1, got -1"),
        ],
    )
    def test_wrong_requests(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(tokenizer_named("reference"), **{"length": 1024, "samples": 1, **change})

    def test_progress_is_shown_on_the_error_stream(self, capsys: pytest.CaptureFixture[str]) -> None:
        generate(tokenizer_named("reference"), 1024, 1, tasks=["vt"], progress=True)
        captured = capsys.readouterr()
        assert "RULER 1024" in captured.err
        assert captured.out == ""


def hub_row(task: str, **changes: Any) -> dict[str, Any]:
    row = {
        "context": f"c {task}",
        "question": "q",
        "answer_prefix": "p",
        "answer": ["1", "2"],
        "task": task,
        "max_new_tokens": 30,
        **changes,
    }
    return {field: value for field, value in row.items() if value is not None}


class TestHub:
    def patch(self, monkeypatch: pytest.MonkeyPatch, rows: Sequence[dict[str, Any]]) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(*args: Any, **kwargs: Any) -> Sequence[dict[str, Any]]:
            calls.append((args, kwargs))
            return rows

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls

    def test_rows_become_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.patch(monkeypatch, [hub_row("vt"), hub_row("cwe"), hub_row("vt"), hub_row("vt")])
        samples = load_hub(4096, samples=2, tasks=["vt"])
        assert calls == [(("simonjegou/ruler", "4096"), {"split": "test"})]
        expected = EvalSample("vt-0000", "vt", "c vt", "q", "p", ("1", "2"), 30, 4096)
        assert samples == [expected, dataclasses.replace(expected, id="vt-0001")]

    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch(monkeypatch, [hub_row("vt"), hub_row("vt", answer=None)])
        with pytest.raises(ValueError, match=r"simonjegou/ruler, row 1: column 'answer' is missing"):
            load_hub(4096, tasks=["vt"])
        self.patch(monkeypatch, [hub_row("vt")])
        with pytest.raises(ValueError, match=r"expected 1 samples of cwe, found 0"):
            load_hub(4096, tasks=["vt", "cwe"])
        with pytest.raises(ValueError, match=r"expected 2 samples of vt, found 1"):
            load_hub(4096, tasks=["vt"], samples=2)
        with pytest.raises(ValueError, match=r"did you mean 'vt'"):
            load_hub(4096, tasks=["vtt"])
        with pytest.raises(ValueError, match=r"samples must be at least 1, got 0"):
            load_hub(4096, samples=0)

    def test_no_network_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub\nand more")

        monkeypatch.setattr("datasets.load_dataset", offline)
        with pytest.raises(ValueError, match=r"^data set simonjegou/ruler, length 4096: Couldn't reach the Hub$"):
            load_hub(4096)


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
