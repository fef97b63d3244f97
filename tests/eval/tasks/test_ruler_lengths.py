"""RULER: prompts as long as asked for, with three kinds of tokenizer, and the text that fills them."""

import dataclasses
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.pipeline import KVPressTextGenerationPipeline
from ruler_tokenizers import TOKENIZERS, tokenizer_named, train_unigram

from pikv_hf.eval.tasks import ruler
from pikv_hf.eval.tasks.ruler import Haystack, generate
from pikv_hf.eval.tasks.ruler.counting import Prompt, TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem, TooShortError, fit
from pikv_hf.eval.tasks.ruler.haystack import data_folder, split_sentences
from pikv_hf.eval.tasks.ruler.words import vocabulary
from pikv_hf.eval.tasks.sample import EvalSample


def pipeline_tokens(tokenizer: Any, sample: EvalSample) -> int:
    """Tokens of a prompt as kvpress's own code makes them."""
    holder = SimpleNamespace(tokenizer=tokenizer)
    made = KVPressTextGenerationPipeline.preprocess(
        holder, sample.context, [sample.question], sample.answer_prefix, 10**9
    )
    return int(made["context_ids"].shape[1] + made["questions_ids"][0].shape[1])


class TestLengths:
    @pytest.mark.slow
    @pytest.mark.parametrize("length", [1024, 1500, 4096])
    @pytest.mark.parametrize("task", ruler.TASKS)
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_every_sample_fills_98_to_100_per_cent(self, name: str, task: str, length: int) -> None:
        tokenizer = tokenizer_named(name)
        for sample in generate(tokenizer, length, 8, tasks=[task]):
            tokens = pipeline_tokens(tokenizer, sample) + sample.max_new_tokens
            assert 0.98 * length <= tokens <= length

    @pytest.mark.slow
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
