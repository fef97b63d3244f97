"""RULER: question answering over documents, and the files that questions are read from."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from question_files import write_hotpot, write_squad
from ruler_tokenizers import reference_samples, tokenizer_named

from pikv_hf.eval.tasks.ruler import Haystack, generate
from pikv_hf.eval.tasks.ruler.haystack import data_folder
from pikv_hf.eval.tasks.ruler.question_sets import read_hotpotqa, read_squad
from pikv_hf.eval.tasks.sample import EvalSample


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
