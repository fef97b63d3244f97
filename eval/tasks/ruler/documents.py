"""Question answering (`qa_1`, `qa_2`): the documents with the answer among distractors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from random import Random
from typing import Any

from pikv_hf.eval.tasks.ruler import templates
from pikv_hf.eval.tasks.ruler.counting import Pieces, TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem
from pikv_hf.eval.tasks.ruler.haystack import Haystack
from pikv_hf.eval.tasks.ruler.question_sets import Question, QuestionSet
from pikv_hf.eval.tasks.ruler.words import shuffled

# Answers to comparisons that are not names: almost every document holds one of these words.
_VERDICTS = {"yes", "no"}


@dataclass(frozen=True, slots=True)
class Documents:
    """Numbered documents in random order.

    Attributes
    ----------
    gold : tuple of str
        Documents that the answer follows from.
    others : Pieces
        Distractors, with their running cost.
    headings : tuple of int
        Running cost of the headings, from none on.
    seed : int
        Of the order.
    base : int
        Tokens of the lead and the gold documents.
    counter : TokenCounter
        For the tail.
    """

    gold: tuple[str, ...]
    others: Pieces
    headings: tuple[int, ...]
    seed: int
    base: int
    counter: TokenCounter

    @property
    def least(self) -> int:
        """No distractor."""
        return 0

    @property
    def largest(self) -> int:
        """All distractors."""
        return len(self.others)

    def cost(self, size: int) -> int:
        """Estimated tokens with `size` distractors."""
        return self.base + self.headings[len(self.gold) + size] + self.others.reach[size]

    def tail(self, size: int, room: int) -> tuple[str, int]:
        """The beginning of the next distractor, which becomes the last document."""
        if size == len(self.others):
            return "", 0
        heading = self.headings[len(self.gold) + size + 1] - self.headings[len(self.gold) + size]
        text, cost = self.counter.take(self.others.texts[size].split(" "), room - heading, "\n")
        return (text, cost + heading) if text else ("", 0)

    def context(self, size: int, tail: str) -> str:
        """Lead and documents, ending with an empty line."""
        documents = [*self.gold, *self.others.texts[:size]]
        Random(self.seed).shuffle(documents)
        numbered = [f"{_heading(index)}{text}" for index, text in enumerate([*documents, *([tail] if tail else [])])]
        return f"{templates.QA_LEAD}{_joined(numbered)}"

    def extra(self, size: int) -> Mapping[str, Any]:
        """How many whole documents there are."""
        return {"documents": len(self.gold) + size}


def document_problem(
    questions: QuestionSet, rng: Random, index: int, counter: TokenCounter, haystack: Haystack, budget: int, order: str
) -> Problem:
    """Ask question `index` of the set among documents of up to `budget` tokens.

    The questions come in an order that the seed `order` fixes, and start over when all were asked. Distractors are
    first the near documents, then the others of the set, then passages of the haystack; none of them holds a reference
    answer. Documents are coarse, so the last distractor is cut where whole ones leave more than 2% of the length.
    """
    sequence = list(shuffled(Random(order), len(questions.questions)))
    question = questions.questions[sequence[index % len(sequence)]]
    gold = tuple(questions.documents[number] for number in question.gold)
    # A quarter more than the budget, since the estimate may be too high.
    distractors = _distractors(questions, question, rng, haystack, budget)
    others = counter.gather(distractors, budget + budget // 4, "\n")
    base = counter.cost(templates.QA_LEAD, "") + sum(counter.costs(gold, "\n"))
    headings = counter.costs([_heading(number) for number in range(len(gold) + len(others) + 1)], "\n\n")
    reach = tuple(accumulate(headings, initial=0))
    draft = Documents(gold, others, reach, rng.getrandbits(64), base, counter)
    return Problem(draft, templates.document_question(question.text), templates.QA_PREFIX, question.answers)


def _distractors(
    questions: QuestionSet, question: Question, rng: Random, haystack: Haystack, budget: int
) -> Iterator[str]:
    """Documents without the answer, the nearest first."""
    answered = _answer_pattern(question.answers)
    for document in _candidates(questions, question, rng, haystack, budget):
        if answered is None or not answered.search(document):
            yield document


def _candidates(
    questions: QuestionSet, question: Question, rng: Random, haystack: Haystack, budget: int
) -> Iterator[str]:
    """Near documents, other documents of the set, then passages of the haystack."""
    yield from (questions.documents[number] for number in rng.sample(question.near, len(question.near)))
    known = {*question.gold, *question.near}
    numbers = (number for number in shuffled(rng, len(questions.documents)) if number not in known)
    yield from (questions.documents[number] for number in numbers)
    # A passage is more than one token; the limit ends the search where every passage holds the answer.
    yield from islice(haystack.documents(rng), budget)


def _answer_pattern(answers: Sequence[str]) -> re.Pattern[str] | None:
    """Matches a document that holds an answer; None where an answer is a verdict and not a part of a document."""
    if any(answer.lower() in _VERDICTS for answer in answers):
        return None
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, answers))})(?!\w)", re.IGNORECASE)


def _heading(index: int) -> str:
    """What stands above the document at `index`."""
    return f"Document {index + 1}:\n"


def _joined(documents: Sequence[str]) -> str:
    """Documents with an empty line after each."""
    return "".join(f"{document}\n\n" for document in documents)
