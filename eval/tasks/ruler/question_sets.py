"""Read questions about documents: files in the schemas of SQuAD 2.0 and HotpotQA."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """A question about documents of a set, which it names by number.

    Attributes
    ----------
    text : str
        The question.
    answers : tuple of str
        References, of which any is right.
    gold : tuple of int
        Documents that the answer follows from.
    near : tuple of int
        Documents that resemble them: of the same article, or chosen as distractors by the authors of the set.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Documents and questions about them; `name` is the file they are from."""

    name: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def read_squad(file: str | Path) -> QuestionSet:
    """Read single-hop questions in the schema of SQuAD 2.0; impossible ones are left out, as RULER does.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not JSON, lacks a field or holds no question; the message names the file and the entry.
    """
    root = _Node(_load(file), str(file))
    numbers: dict[str, int] = {}
    questions = [question for article in root["data"] for question in _squad_questions(article, numbers)]
    return _question_set(file, numbers, questions)


def read_hotpotqa(file: str | Path) -> QuestionSet:
    """Read two-hop questions in the schema of HotpotQA (distractor setting).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not JSON, lacks a field or holds no question; the message names the file and the entry.
    """
    numbers: dict[str, int] = {}
    questions = [_hotpot_question(entry, numbers) for entry in _Node(_load(file), str(file))]
    return _question_set(file, numbers, questions)


@dataclass(frozen=True, slots=True)
class _Node:
    """A value of a JSON file that knows where it is, so that a missing field can be named."""

    value: Any
    place: str

    def __getitem__(self, field: str) -> "_Node":
        if not isinstance(self.value, Mapping):
            raise ValueError(f"{self.place}: expected an object with {field!r}, found {_kind(self.value)}")
        if field not in self.value:
            raise ValueError(f"{self.place}: field {field!r} is missing, found {', '.join(self.value) or 'none'}")
        return _Node(self.value[field], f"{self.place}.{field}" if "[" in self.place else f"{self.place}: {field}")

    def __iter__(self) -> Iterator["_Node"]:
        if not isinstance(self.value, list):
            raise ValueError(f"{self.place}: expected a list, found {_kind(self.value)}")
        spot = self.place if ":" in self.place else f"{self.place}: entry "
        return iter([_Node(item, f"{spot}[{index}]") for index, item in enumerate(self.value)])

    def text(self) -> str:
        """The value, if it is a text that is not empty."""
        if not self.string().strip():
            raise ValueError(f"{self.place}: expected a text, found an empty one")
        return self.string()

    def string(self) -> str:
        """The value, if it is a text, even an empty one."""
        if not isinstance(self.value, str):
            raise ValueError(f"{self.place}: expected a text, found {_kind(self.value)}")
        return self.value


def _kind(value: object) -> str:
    """What a JSON value is, for messages."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)


def _load(file: str | Path) -> Any:
    """The JSON value in `file`."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"question set {file}: no such file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: expected JSON, found an error: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text, {error}") from error


def _question_set(file: str | Path, numbers: Mapping[str, int], questions: list[Question]) -> QuestionSet:
    """Put a set together, which must not be empty."""
    if not questions:
        raise ValueError(f"{file}: expected at least one question with an answer, found none")
    return QuestionSet(str(file), tuple(numbers), tuple(questions))


def _number(numbers: dict[str, int], document: str) -> int:
    """The number of a document; the same text is one document."""
    return numbers.setdefault(document, len(numbers))


def _squad_questions(article: _Node, numbers: dict[str, int]) -> Iterator[Question]:
    """Questions of one article; its other paragraphs are near."""
    paragraphs = list(article["paragraphs"])
    owned = [_number(numbers, paragraph["context"].text()) for paragraph in paragraphs]
    for gold, paragraph in zip(owned, paragraphs, strict=True):
        near = tuple(dict.fromkeys(number for number in owned if number != gold))
        for entry in paragraph["qas"]:
            if not entry["is_impossible"].value:
                yield Question(entry["question"].text(), _squad_answers(entry, paragraph), (gold,), near)


def _squad_answers(entry: _Node, paragraph: _Node) -> tuple[str, ...]:
    """Different answers of one question, each of which its paragraph must hold."""
    answers = tuple(dict.fromkeys(answer["text"].text() for answer in entry["answers"]))
    if not answers:
        raise ValueError(f"{entry.place}.answers: expected at least one answer, found none")
    for answer in answers:
        if answer not in paragraph["context"].value:
            raise ValueError(f"{entry.place}.answers: expected a part of the paragraph, found {answer!r}")
    return answers


def _hotpot_question(entry: _Node, numbers: dict[str, int]) -> Question:
    """One question; the documents that are no supporting fact are near."""
    documents = {title: _number(numbers, document) for title, document in map(_hotpot_document, entry["context"])}
    titles = {title.text() for title, _ in map(_pair, entry["supporting_facts"])}
    if missing := sorted(titles - documents.keys()):
        raise ValueError(f"{entry.place}.supporting_facts: {missing[0]!r} is not among the titles of the context")
    gold = tuple(number for title, number in documents.items() if title in titles)
    near = tuple(number for title, number in documents.items() if title not in titles)
    return Question(entry["question"].text(), (entry["answer"].text(),), gold, near)


def _hotpot_document(paragraph: _Node) -> tuple[str, str]:
    """Title and text of one document; the title is its first line, as in RULER."""
    title, sentences = _pair(paragraph)
    # HotpotQA has empty sentences.
    return title.text(), f"{title.text()}\n{''.join(sentence.string() for sentence in sentences).strip()}"


def _pair(node: _Node) -> tuple[_Node, _Node]:
    """The two items of a list of two."""
    items = list(node)
    if len(items) != 2:
        raise ValueError(f"{node.place}: expected a list of two, found {len(items)} items")
    return items[0], items[1]
