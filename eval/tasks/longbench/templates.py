"""Prompt templates, and how a prompt is cut into context, question and answer prefix.

A template is text with `{context}` and, after it, `{input}` or nothing. A file of them is a JSON object from set to
template: the official `config/dataset2prompt.json`, or the one beside this module. Ours has the official structure and
cues in our own words, so that no text of the benchmark is copied; for figures to compare with published ones, pass the
official file.
"""

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pikv_hf.eval.tasks.longbench.sets import LongBenchSet

#: Our own wording.
PROMPTS = Path(__file__).parent / "data" / "prompts.json"


@dataclass(frozen=True, slots=True)
class Parts:
    """A prompt as kvpress's pipeline takes it: context, question, a newline, answer prefix."""

    context: str
    question: str
    answer_prefix: str


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The fixed text of a prompt.

    Attributes
    ----------
    head : str
        Before the context.
    middle : str
        After it, up to the input if there is one.
    tail : str
        After the input, up to the cue.
    has_input : bool
        Whether the prompt contains the sample's input.
    cue : str
        End of the prompt; empty for few-shot sets, whose input ends with it.
    """

    head: str
    middle: str
    tail: str
    has_input: bool
    cue: str

    @property
    def cut(self) -> int:
        """Characters of `middle` that belong to the context part.

        With an input that is all up to the line in which the input stands, so that its label (`Question:`) goes with
        it. Without one it is the line breaks after the context, so that the repeated instruction is the question.
        """
        if self.has_input:
            return self.middle.rfind("\n") + 1
        return len(self.middle) - len(self.middle.lstrip("\n"))

    def fill(self, context: str, text: str, entry: LongBenchSet) -> Parts:
        """Fill in one sample and cut the prompt into its parts.

        Context, question, newline and prefix joined give the prompt of the template. One case differs: where the
        template has no line break before the cue (a code set whose code does not end with one, or a few-shot input
        without its cue), the pipeline's newline is added to it.
        """
        cue = self.cue
        if entry.few_shot:
            text, cue = split_cue(text, entry.cue)
        before = self.head + context + self.middle[: self.cut]
        question = self.middle[self.cut :] + (text if self.has_input else "") + self.tail
        # The pipeline puts a newline before the answer prefix, so the prompt's own is left out.
        if question.endswith("\n"):
            question = question[:-1]
        elif not question and before.endswith("\n"):
            before = before[:-1]
        return Parts(before, question, cue)


def split_cue(text: str, cue: str) -> tuple[str, str]:
    """Split the cue, with the blanks after it, off the end of a few-shot input; it is empty if the input has none."""
    if not text.rstrip().endswith(cue):
        return text, ""
    start = text.rindex(cue)
    return text[:start], text[start:]


def parse_template(text: str, entry: LongBenchSet, place: str) -> PromptTemplate:
    """Take a template apart.

    Raises
    ------
    ValueError
        If it does not hold `{context}` once and at most one `{input}` after it, or does not end with the answer cue
        (few-shot sets: with `{input}`).
    """
    expected = f"{place}, {entry.name}: expected {{context}} and then at most one {{input}}"
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{expected}, {error}") from None
    fields = [field for _, field, _, _ in pieces if field is not None]
    if fields not in (["context"], ["context", "input"]) or any(spec or conversion for *_, spec, conversion in pieces):
        raise ValueError(f"{expected}, got the fields {fields}")
    ending = "{input}" if entry.few_shot else entry.cue
    if not text.endswith(ending):
        raise ValueError(f"{place}, {entry.name}: expected {ending!r} at the end, got {text[-len(ending) :]!r}")
    return _from_literals(_literals(pieces), "" if entry.few_shot else entry.cue)


def _literals(pieces: Iterable[tuple[str, str | None, str | None, str | None]]) -> list[str]:
    """Return the texts between the fields; an escaped brace splits none of them."""
    texts = [""]
    for literal, field, _, _ in pieces:
        texts[-1] += literal
        if field is not None:
            texts.append("")
    return texts


def _from_literals(texts: list[str], cue: str) -> PromptTemplate:
    """Build a template from the two or three texts around its fields, less the cue at the end."""
    texts[-1] = texts[-1].removesuffix(cue)
    head, middle, *tail = texts
    return PromptTemplate(head, middle, "".join(tail), bool(tail), cue)


def load_templates(entries: Iterable[LongBenchSet], path: Path | None = None) -> dict[str, PromptTemplate]:
    """Read the templates of some sets from a JSON file, by default our own.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no JSON object from set to template, lacks a set, or a template cannot be used.
    """
    path = PROMPTS if path is None else path
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: expected LongBench's dataset2prompt.json")
    try:
        prompts = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object from set to template, {error}") from None
    return {entry.name: parse_template(_prompt(prompts, entry, path), entry, str(path)) for entry in entries}


def _prompt(prompts: object, entry: LongBenchSet, path: Path) -> str:
    """Return the template of one set."""
    prompt = prompts.get(entry.name) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"{path}: expected a template for {entry.name!r}, got {prompt!r}")
    return prompt
