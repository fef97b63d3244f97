"""Ask a question in one of two ways: after the context was compressed without it, or together with it.

The first is what kvpress's pipeline does: the context is read once and compressed, then the question and the answer's
first words follow. The second is plain `generate` over the whole prompt; a press then sees the question.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.runner.meter import Cost, Meter
from pikv_hf.eval.runner.press_phases import PressPhases
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote after the answer prefix, and what that cost.

    Attributes
    ----------
    text : str
        Without special tokens.
    context_tokens, question_tokens, new_tokens : int
        Read as context, read as question with answer prefix, and generated (an end token included).
    rows : int
        Sequences that share the cost: the batch.
    cost : Cost
        Of the whole batch.
    """

    text: str
    context_tokens: int
    question_tokens: int
    new_tokens: int
    rows: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as token ids, `(1, T)` and `(1, Q)` int64."""

    context: torch.Tensor
    question: torch.Tensor
    max_new_tokens: int


class Asker:
    """Asks as kvpress's pipeline does, with a meter: the same prompts, and presses act when they do there.

    Three things differ: a tokenizer may lack a beginning-of-text token, an end token that comes first ends the answer,
    and nothing is taken out of the cache afterwards, since each cache serves one question.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.meter = Meter(model.device)
        self._frame = frame(tokenizer)

    def encode(self, sample: EvalSample, max_context: int | None = None) -> Encoded:
        """Tokenise a sample as kvpress does; a context longer than `max_context` loses its end."""
        before, between = self._frame
        context = self._ids(before + sample.context)
        question = self._ids(sample.question + between + sample.answer_prefix)
        return Encoded(context[:, :max_context], question, sample.max_new_tokens)

    def _ids(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        return ids.to(self.model.device, torch.long)

    @torch.no_grad()
    def ask(self, encoded: Encoded, cache: Any, press: Any = None) -> Answer:
        """Read the context, compress it, then answer the question."""
        phases = PressPhases.of(press)
        self.meter.start()
        with press(self.model) if phases.context else contextlib.nullcontext():
            # Without the language model's head: nobody asks what follows the context.
            self.model.model(input_ids=encoded.context, **cache_argument(cache))
        length = int(cache.get_seq_length()) if phases.renumbers else encoded.context.shape[1]
        with press(self.model) if phases.answer else contextlib.nullcontext():
            written = self.continued(encoded.question, cache, length, encoded.max_new_tokens)
        cost = self.meter.finish(cache)
        return self._answer(encoded, written, 1, cost)

    def continued(self, ids: torch.Tensor, cache: Any, position: int, max_new_tokens: int) -> list[int]:
        """Return how a context that was read goes on, greedily, after a question `(1, Q)` at this position."""
        self.meter.prefilled(cache)
        written: list[int] = []
        while True:
            positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
            logits = self.model(input_ids=ids, **cache_argument(cache), position_ids=positions, logits_to_keep=1).logits
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            if not written:
                self.meter.decoding()
            written.append(int(ids.item()))
            if written[-1] in self.end_tokens or len(written) == max_new_tokens:
                return written

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        end = self.model.generation_config.eos_token_id
        return tuple(end) if isinstance(end, list) else () if end is None else (end,)

    @torch.no_grad()
    def ask_together(self, batch: Sequence[Encoded], cache: Any, press: Any = None) -> list[Answer]:
        """Read contexts with their questions and answer, by `generate`; a press sees the questions.

        Several samples are padded on the left; the shorter ones then wait for the longest answer.
        """
        ids, mask = self._padded(batch, query_aware=True)
        limit = max(encoded.max_new_tokens for encoded in batch)
        self.meter.start()
        with press(self.model) if press is not None else contextlib.nullcontext():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **cache_argument(cache),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=self._pad_token,
                stopping_criteria=StoppingCriteriaList([_FirstToken(lambda: self.meter.prefilled(cache))]),
            )
        cost = self.meter.finish(cache)
        return [
            self._answer(encoded, output[row, ids.shape[1] :].tolist(), len(batch), cost)
            for row, encoded in enumerate(batch)
        ]

    def _padded(self, batch: Sequence[Encoded], query_aware: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts, or contexts with their questions, as `(B, T)` ids padded on the left, and their mask."""
        parts = [[encoded.context, encoded.question] if query_aware else [encoded.context] for encoded in batch]
        return pad_left([torch.cat(part, dim=1) for part in parts], self._pad_token)

    def prompt(self, batch: Sequence[Encoded], query_aware: bool) -> dict[str, torch.Tensor]:
        """Return what is read before the first answer begins, as the decoder is called with it."""
        ids, mask = self._padded(batch, query_aware)
        padded = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": _positions(mask)}
        return {"input_ids": ids, **padded}

    @torch.no_grad()
    def ask_batch(self, batch: Sequence[Encoded], cache: Any) -> list[Answer]:
        """Answer several samples at once, contexts and questions padded on the left; for caches without a press."""
        self.meter.start()
        seen = self.read_batch(batch, cache)
        self.meter.prefilled(cache)
        generated = self.answer_batch(batch, cache, seen)
        cost = self.meter.finish(cache)
        return [self._answer(*pair, len(batch), cost) for pair in zip(batch, generated, strict=True)]

    @torch.no_grad()
    def read_batch(self, batch: Sequence[Encoded], cache: Any) -> torch.Tensor:
        """Read contexts, padded on the left; return which columns hold a token, `(B, T)`."""
        contexts, seen = self._padded(batch, query_aware=False)
        self.model.model(
            input_ids=contexts, attention_mask=seen, position_ids=_positions(seen), **cache_argument(cache)
        )
        return seen

    @torch.no_grad()
    def answer_batch(self, batch: Sequence[Encoded], cache: Any, seen: torch.Tensor) -> list[list[int]]:
        """Answer the questions about contexts that a cache holds; return the tokens of each row, and what follows."""
        ids, mask = pad_left([encoded.question for encoded in batch], self._pad_token)
        limits = torch.tensor([encoded.max_new_tokens for encoded in batch], device=ids.device)
        ends = torch.tensor(self.end_tokens, device=ids.device)
        open_rows = torch.ones(len(batch), dtype=torch.bool, device=ids.device)
        steps: list[torch.Tensor] = []
        while open_rows.any():
            seen = torch.cat([seen, mask], dim=1)
            positions = _positions(seen)[:, -ids.shape[1] :]
            logits = self.model(
                input_ids=ids, attention_mask=seen, position_ids=positions, **cache_argument(cache), logits_to_keep=1
            ).logits
            if not steps:
                self.meter.decoding()
            # A row that has ended is fed padding, which no later token looks at.
            new = torch.where(open_rows, logits[:, -1].argmax(-1), self._pad_token)
            steps.append(new)
            open_rows &= ~torch.isin(new, ends) & (len(steps) < limits)
            ids, mask = new[:, None], open_rows[:, None].to(mask.dtype)
        return torch.stack(steps, dim=1).tolist()

    def text_of(self, encoded: Encoded, generated: Sequence[int]) -> str:
        """Return what a row says, up to its end."""
        kept = self._until_end(encoded, generated)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _until_end(self, encoded: Encoded, generated: Sequence[int]) -> Sequence[int]:
        generated = generated[: encoded.max_new_tokens]
        end = next((i for i, token in enumerate(generated) if token in self.end_tokens), len(generated) - 1)
        return generated[: end + 1]

    def _answer(self, encoded: Encoded, generated: list[int], rows: int, cost: Cost) -> Answer:
        """Cut what `generate` or a batch wrote behind the end of this row's answer."""
        kept = self._until_end(encoded, generated)
        text = self.text_of(encoded, generated)
        return Answer(text, encoded.context.shape[1], encoded.question.shape[1], len(kept), rows, cost)

    @property
    def _pad_token(self) -> int:
        """What rows are filled up with; any token does, since the mask hides it."""
        return self.tokenizer.pad_token_id or 0


class _FirstToken(StoppingCriteria):
    """Calls back once `generate` has its first token, when the cache holds the prompt and nothing else."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._callback is not None:
            self._callback()
            self._callback = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def pad_left(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack `(1, T_i)` ids to `(B, T)`, padded on the left, with their `(B, T)` int64 attention mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return ids, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its row `(B, T)`, counted without padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
