"""One sample, many presses: read its prompt, let each compress it, write all answers, note scores and bytes."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.memory_meter import DynamicFootprint, stored_bytes
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.eval.runner.protocol import Asker, Encoded
from pikv_hf.eval.studies.presses.batched_answers import answers
from pikv_hf.eval.studies.presses.further_readings import read_further, reads_further
from pikv_hf.eval.studies.presses.one_reading import Kept, read_once, shares_a_reading
from pikv_hf.eval.studies.presses.paged_presses import LAYOUT, bytes_of, read_paged
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.presses.joint_press import JointPress

Row = dict[str, Any]

#: Caches without a press, by what tables call them.
FULL, INT4 = "DynamicCache", "PiKVCache int4"
_CODECS: dict[str, Any] = {"key_codec": "int4", "value_codec": "int4"}


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A press at a ratio, or a cache without a press.

    Attributes
    ----------
    name : str
        The press as `pikv eval` takes it, or `FULL`, `INT4`.
    share : float
        Of the bytes that a press is to leave, 1 without one.
    """

    name: str
    share: float = 1.0

    def press(self) -> Any:
        """Return a new press, None without one."""
        return None if self.name in (FULL, INT4) else press_factory(self.name, 1 - self.share).make()


def check(methods: Sequence[Method]) -> None:
    """Raise `InputError` for a press that cannot be measured together with others."""
    for method in methods:
        press = method.press()
        if not (press is None or isinstance(press, JointPress) or shares_a_reading(press) or reads_further(press)):
            raise InputError(f"{method.name} neither acts in a prompt's hooks alone nor is it known here otherwise")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """What is read and compressed, and what follows it.

    Attributes
    ----------
    ids : torch.Tensor
        `(1, T)`.
    question : torch.Tensor or None
        `(1, Q)`; None if the prompt has it, and its first answer token comes from reading the prompt.
    limit : int
        Most tokens of an answer.
    """

    ids: torch.Tensor
    question: torch.Tensor | None
    limit: int

    @classmethod
    def of(cls, encoded: Encoded, query_aware: bool) -> "Prompt":
        """Return the prompt of a sample."""
        if query_aware:
            return cls(torch.cat([encoded.context, encoded.question], dim=1), None, encoded.max_new_tokens)
        return cls(encoded.context, encoded.question, encoded.max_new_tokens)


class SampleRunner:
    """Measures samples on a model.

    Parameters
    ----------
    asker : Asker
        With the model and its tokenizer.
    score : callable
        From a sample and an answer to named scores.
    query_aware : bool
        Whether presses see the question.
    """

    def __init__(self, asker: Asker, score: Any, *, query_aware: bool) -> None:
        self.asker, self.model, self.score, self.query_aware = asker, asker.model, score, query_aware
        self._footprint = DynamicFootprint.of(asker.model)

    def measure(self, sample: EvalSample, methods: Sequence[Method]) -> list[Row]:
        """Return a row per method: its score and bytes, or its error."""
        encoded = self.asker.encode(sample)
        prompt = Prompt.of(encoded, self.query_aware)
        presses = {method: method.press() for method in methods}
        own = {method: press for method, press in presses.items() if isinstance(press, JointPress)}
        return [
            self._row(method, sample, encoded, tokens, prompt, kv_bytes)
            for method, tokens, kv_bytes in [
                *self._dense(prompt, {m: p for m, p in presses.items() if m not in own and m.name != INT4}, sample.id),
                *self._paged(prompt, own, any(method.name == INT4 for method in methods)),
            ]
        ]

    def _row(
        self, method: Method, sample: EvalSample, encoded: Encoded, tokens: list[int] | str, prompt: Prompt, kept: int
    ) -> Row:
        row = {"press": method.name, "share": method.share, "id": sample.id, "task": sample.task}
        if isinstance(tokens, str):
            return row | {"error": tokens}
        text = self.asker.text_of(encoded, tokens)
        return row | {
            "score": next(iter(self.score(sample, text).values())),
            "kv_bytes": kept,
            "kv_share": kept / self._footprint.bf16_bytes(prompt.ids.shape[1]),
            "answer": text,
        }

    # kvpress's presses, and no press: dense caches, answers in batches

    def _dense(
        self, prompt: Prompt, presses: Mapping[Method, Any], name: str
    ) -> Iterator[tuple[Method, list[int] | str, int]]:
        if not presses:
            return
        acting = {method: press for method, press in presses.items() if press is not None and shares_a_reading(press)}
        reading = read_once(self.model, prompt.ids, acting, zlib.crc32(name.encode()) >> 1)
        kept = dict(reading.kept)
        for method in presses:
            if method.name == FULL:
                kept[method] = Kept(reading.full, [None] * len(reading.full.layers), prompt.ids.shape[1])
        for group in _by_name({method: press for method, press in presses.items() if reads_further(press)}):
            kept |= read_further(self.model, prompt.ids, reading.full, group)
        for method, written in zip(kept, self._written(prompt, list(kept.values()), reading.logits), strict=True):
            yield method, written, bytes_of(self.model, kept[method])
        for method, error in reading.refused.items():
            yield method, error, 0

    def _written(self, prompt: Prompt, kept: list[Kept], logits: torch.Tensor) -> list[list[int]]:
        ends = self.asker.end_tokens
        if prompt.question is not None:
            return answers(self.model, kept, prompt.question, prompt.limit, ends)
        first = int(logits.argmax(-1))
        if first in ends or prompt.limit == 1:
            return [[first]] * len(kept)
        ids = torch.tensor([[first]])
        return [[first, *rest] for rest in answers(self.model, kept, ids, prompt.limit - 1, ends)]

    # This project's: paged caches, one answer at a time

    def _paged(
        self, prompt: Prompt, presses: Mapping[Method, Any], int4: bool
    ) -> Iterator[tuple[Method, list[int], int]]:
        for group in _by_name(presses):
            caches, logits = read_paged(self.model, prompt.ids, group)
            for method, cache in caches.items():
                kv_bytes = stored_bytes(cache)
                yield method, self._answer(prompt, cache, logits), kv_bytes
        if int4:
            cache = PiKVCache.for_model(self.model, **LAYOUT, **_CODECS)
            with torch.no_grad():
                read = self.model(input_ids=prompt.ids, **cache_argument(cache), logits_to_keep=1)
            kv_bytes = stored_bytes(cache)
            yield Method(INT4), self._answer(prompt, cache, read.logits[:, -1]), kv_bytes

    @torch.no_grad()
    def _answer(self, prompt: Prompt, cache: Any, logits: torch.Tensor) -> list[int]:
        length = prompt.ids.shape[1]
        if prompt.question is not None:
            return self.asker.continued(prompt.question, cache, length, prompt.limit)
        first = int(logits.argmax(-1))
        if first in self.asker.end_tokens or prompt.limit == 1:
            return [first]
        return [first, *self.asker.continued(torch.tensor([[first]]), cache, length, prompt.limit - 1)]


def _by_name(presses: Mapping[Method, Any]) -> Iterator[dict[Method, Any]]:
    """Return presses that differ in nothing but their ratio together."""
    for name in dict.fromkeys(method.name for method in presses):
        yield {method: press for method, press in presses.items() if method.name == name}
