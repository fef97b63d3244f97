"""Cut a run into batches, and turn each batch into rows."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pikv_hf.eval.errors import InputError, out_of_memory, reason, user_input
from pikv_hf.eval.runner.folder import Row
from pikv_hf.eval.runner.memory_meter import DynamicFootprint
from pikv_hf.eval.runner.meter import Meter
from pikv_hf.eval.runner.method import Subject
from pikv_hf.eval.runner.options import EvalOptions
from pikv_hf.eval.runner.perplexity import WindowLoss, score_window
from pikv_hf.eval.runner.press_effect import PressEffect
from pikv_hf.eval.runner.protocol import Answer, Asker, Encoded
from pikv_hf.eval.runner.rows import answer_row, kv_shares, times
from pikv_hf.eval.tasks.perplexity import Window
from pikv_hf.eval.tasks.sample import EvalSample, EvalSet
from pikv_hf.layer.own_layer import layers_of

#: Tokens of the unrecorded prompt that pays for what only a process's first forward costs.
_WARM_UP_TOKENS = 64


class Item(Protocol):
    """Something to be measured, with an id of its own."""

    @property
    def id(self) -> str:
        """Unique within the run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """All items of a run, and the function that turns a batch of them into rows."""

    items: Sequence[Item]
    measure: Callable[[Sequence[Any]], list[Row]]
    warm_up: Callable[[], None]


def question_job(subject: Subject, eval_set: EvalSet, options: EvalOptions) -> Job:
    """Prepare a run of questions about contexts."""
    asker = Asker(subject.model, subject.tokenizer)
    _check_decoder(subject.model)
    footprint = _footprint(subject.model)
    effect = PressEffect(subject, footprint)

    def measure(batch: Sequence[EvalSample]) -> list[Row]:
        encoded = [asker.encode(sample, options.max_context) for sample in batch]
        seed_for(options.seed, batch[0].id)
        cache, together = subject.new_cache(), options.query_aware
        answers = _ask(asker, subject, cache, encoded, together)
        kv_bytes = answers[0].cost.kv_bytes_prefill
        effect.check(cache, kv_bytes, _read_first(answers, together), lambda: asker.prompt(encoded, together))
        shares = _shares(answers, footprint, options.query_aware)
        return [
            answer_row(
                sample,
                answer,
                eval_set.score(sample, answer.text),
                shares,
                subject.method.ratio,
                eval_set.columns,
            )
            for sample, answer in zip(batch, answers, strict=True)
        ]

    def warm_up() -> None:
        asker.ask(_beginning(asker.encode(eval_set.samples[0])), subject.new_cache())

    return Job(eval_set.samples, measure, warm_up)


def _check_decoder(model: Any) -> None:
    if not hasattr(model, "model"):
        raise InputError(
            f"{type(model).__name__} has no decoder named model, by which kvpress's pipeline reads contexts"
        )


def _footprint(model: Any) -> DynamicFootprint:
    """Return what `DynamicCache` holds for a model: the first time that a model of unknown kind is run."""
    try:
        return DynamicFootprint.of(model)
    except Exception as error:
        if out_of_memory(error):
            raise
        with user_input(f"cannot evaluate {type(model).__name__}"):
            layers_of(model.config)
        raise InputError(
            f"cannot evaluate {type(model).__name__}: it does not run with DynamicCache: {reason(error)}"
        ) from error


def _beginning(encoded: Encoded) -> Encoded:
    """Return a short prompt, to be read without a press, which may want more tokens."""
    return dataclasses.replace(encoded, context=encoded.context[:, :_WARM_UP_TOKENS], max_new_tokens=2)


def _ask(asker: Asker, subject: Subject, cache: Any, encoded: Sequence[Encoded], query_aware: bool) -> list[Answer]:
    press = subject.method.new_press()
    if query_aware:
        return asker.ask_together(encoded, cache, press)
    if len(encoded) > 1:
        return asker.ask_batch(encoded, cache)
    return [asker.ask(encoded[0], cache, press)]


def _shares(answers: Sequence[Answer], footprint: DynamicFootprint, query_aware: bool) -> Row:
    """Return the shares of a batch. The last token of an answer is generated, never read."""
    prompts, prefill = _read_first(answers, True), _read_first(answers, query_aware)
    end = [prompt + answer.new_tokens - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    return kv_shares(answers[0].cost, len(answers), footprint, prefill, end)


def _read_first(answers: Sequence[Answer], query_aware: bool) -> list[int]:
    """Return how many tokens each row has when a press has compressed it."""
    return [answer.context_tokens + query_aware * answer.question_tokens for answer in answers]


def perplexity_job(subject: Subject, cut: Sequence[Window], options: EvalOptions) -> Job:
    """Prepare a run over windows of a text."""
    footprint, meter = _footprint(subject.model), Meter(subject.model.device)
    effect = PressEffect(subject, footprint)

    def measure(batch: Sequence[Window]) -> list[Row]:
        [window] = batch
        seed_for(options.seed, window.id)
        cache, press = subject.new_cache(), subject.method.new_press()
        loss = score_window(subject.model, window, options.chunk, cache, press, meter)
        prompt = {"input_ids": window.ids[:, : window.prefill]}
        effect.check(cache, loss.cost.kv_bytes_prefill, [window.prefill], lambda: prompt)
        return [_window_row(window, loss, subject.method.ratio, footprint)]

    def warm_up() -> None:
        score_window(subject.model, cut[0], options.chunk, subject.new_cache(), None, meter)

    return Job(cut, measure, warm_up)


def _window_row(window: Window, loss: WindowLoss, ratio: float, footprint: DynamicFootprint) -> Row:
    length = window.ids.shape[1]
    return {
        "id": window.id,
        "task": "perplexity",
        "length": length,
        "compression_ratio": ratio,
        "metric": "nats_per_token",
        "score": loss.nats,
        "context_tokens": window.prefill,
        "question_tokens": length - window.prefill - loss.scored,
        "new_tokens": loss.scored,
        **kv_shares(loss.cost, 1, footprint, [window.prefill], [length]),
        **times(loss.cost, 1, window.prefill, length - window.prefill),
    }


def seed_for(seed: int, name: str) -> None:
    """Seed torch by sample, so that a press that draws at random does so alike in whatever order samples are taken."""
    torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
