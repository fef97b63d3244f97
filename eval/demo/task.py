"""What the demo asks: a model, one context and several questions, from the bundled haystack or the user's own text."""

import dataclasses
import random
import re
from typing import Any

import torch

from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.reference.synthetic import Sample, count_tokens, make_shared_samples
from pikv_hf.eval.runner.models import REFERENCE, load_model, position_limit

REFERENCE_NAME = "bundled reference model"
# Stands in for the question while the chat template is applied; no text file has it.
_MARKER = "\x00question\x00"
_ONE_NUMBER = re.compile(r"special magic number for (.+) mentioned")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready for the model.

    Attributes
    ----------
    question : str
        As shown to people.
    ids : torch.Tensor
        `(1, Q)` int64: what follows the context, up to where the answer begins.
    sample : Sample, optional
        Where the question comes from, if its answer is known.
    verbatim : bool
        Whether the model was trained on the wording of the answer, so that anything else is wrong.
    """

    question: str
    ids: torch.Tensor
    sample: Sample | None
    verbatim: bool

    @property
    def subject(self) -> str:
        """What the question asks for: of a haystack the key alone, else all of the question."""
        if self.sample is None:
            return self.question
        found = _ONE_NUMBER.search(self.question)
        return found[1] if found else f"{len(self.sample.answers)} at once"

    def is_right(self, answer: str) -> bool | None:
        """Judge an answer; None if the right one is not known."""
        if self.sample is None:
            return None
        return self.sample.exact(answer) if self.verbatim else self.sample.string_match(answer) == 1


@dataclasses.dataclass(frozen=True, slots=True)
class DemoTask:
    """Everything the caches are compared on.

    Attributes
    ----------
    name : str
        Of the model, for people.
    model, tokenizer
        From transformers.
    context : torch.Tensor
        `(1, T)` int64, read once.
    prompts : tuple of Prompt
        Each continues the context.
    """

    name: str
    model: Any
    tokenizer: Any
    context: torch.Tensor
    prompts: tuple[Prompt, ...]

    @property
    def pad_token_id(self) -> int | None:
        """What `generate` fills up with; it never does for one sequence, but asks."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def build_task(options: DemoOptions) -> DemoTask:
    """Load the model and tokenize the context and its questions.

    Raises
    ------
    InputError
        If a file, model or device is missing, or the text does not fit the model.
    """
    context, samples = _context_and_samples(options)
    model, tokenizer = load_model(REFERENCE if options.model is None else options.model, options.dtype, options.device)
    device = model.device
    before, after = _around_question(tokenizer, context)
    templated = tokenizer.chat_template is not None
    ids = _encode(tokenizer, before, device, add_special_tokens=not templated)
    prompts = tuple(
        Prompt(question, _encode(tokenizer, question + after + prefix, device), sample, options.model is None)
        for question, prefix, sample in _asked(options, samples)
    )
    name = REFERENCE_NAME if options.model is None else options.model
    task = DemoTask(name, model, tokenizer, ids, prompts)
    _check_length(task, options.max_new_tokens)
    return task


def _context_and_samples(options: DemoOptions) -> tuple[str, list[Sample]]:
    if options.text is not None:
        with user_input(f"cannot read --text {options.text}"):
            text = options.text.read_text(encoding="utf-8").strip()
        if not text:
            raise InputError(f"--text {options.text} is empty")
        return f"{text}\n", []
    with user_input(f"no haystack of --tokens {options.tokens}"):
        samples = make_shared_samples(options.tokens, random.Random(options.seed))
        # That length includes the questions and answers; --tokens means the text alone, <bos> included.
        missing = options.tokens - 1 - count_tokens(samples[0].context)
        samples = make_shared_samples(options.tokens + missing, random.Random(options.seed))
    return samples[0].context, samples


def _asked(options: DemoOptions, samples: list[Sample]) -> list[tuple[str, str, Sample | None]]:
    """Return question, beginning of the answer and known sample of each prompt."""
    if options.text is not None:
        return [(question, "", None) for question in options.questions]
    return [(sample.question, sample.answer_prefix, sample) for sample in samples]


def _around_question(tokenizer: Any, context: str) -> tuple[str, str]:
    """Return what the model reads before the question and between it and the answer."""
    if tokenizer.chat_template is None:
        return context, "\n"
    messages = [{"role": "user", "content": context + _MARKER}]
    with user_input("cannot apply the tokenizer's chat template"):
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, marker, after = chat.partition(_MARKER)
    if not marker:
        raise InputError("the tokenizer's chat template leaves out the user's message")
    return before, after


def _encode(tokenizer: Any, text: str, device: torch.device, add_special_tokens: bool = False) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt").input_ids
    return ids.to(device=device, dtype=torch.long)


def _check_length(task: DemoTask, max_new_tokens: int) -> None:
    limit = position_limit(task.model)
    longest = max(prompt.ids.shape[1] for prompt in task.prompts)
    needed = task.context.shape[1] + longest + max_new_tokens
    if limit is not None and needed > limit:
        raise InputError(
            f"context, longest question and answer take {task.context.shape[1]} + {longest} + {max_new_tokens} = "
            f"{needed} tokens, but {task.name} has {limit} positions"
        )
