"""One cache measured on the demo's task: answers, live bytes and times."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from pikv_hf.common.tensors import live_bytes
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.demo.caches import CacheKind
from pikv_hf.eval.demo.task import DemoTask, Prompt
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_reads import storages


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote with one cache.

    Attributes
    ----------
    text : str
        Without special tokens.
    token_ids : tuple of int
        All generated tokens.
    right : bool or None
        None if the right answer is not known.
    """

    text: str
    token_ids: tuple[int, ...]
    right: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """What one cache cost.

    Attributes
    ----------
    cache : str
        Name of the cache.
    answers : tuple of Answer
        One for each question.
    context_bytes : int
        Live bytes after the context has been read.
    open_bytes : int
        Live bytes of all questions' copies together, after answering; a storage that several of them use counts once.
    prefill_seconds : float
        To read the context.
    copy_seconds : float
        To copy the cache for a question, median.
    token_seconds : float or None
        To generate a token after an answer's first, median; None if no answer has two.
    """

    cache: str
    answers: tuple[Answer, ...]
    context_bytes: int
    open_bytes: int
    prefill_seconds: float
    copy_seconds: float
    token_seconds: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A measurement with what is behind it: the context's cache, and per answer the `(n, V)` float32 logits."""

    measurement: Measurement
    context: Any
    logits: tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    answer: Answer
    logits: torch.Tensor
    steps: list[float]


class _TokenClock(BaseStreamer):
    """Notes when tokens arrive. `generate` hands them over on the CPU, so the device has finished them by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Return the seconds of each token after the first; the clock also saw the prompt."""
        return [after - before for before, after in itertools.pairwise(self.times[1:])]


@torch.no_grad()
def measure(task: DemoTask, kind: CacheKind, max_new_tokens: int) -> Run:
    """Read the context once and answer every question from a copy of the cache.

    Parameters
    ----------
    task : DemoTask
        Model, context and questions.
    kind : CacheKind
        The cache.
    max_new_tokens : int
        Limit of each answer.
    """
    _warm_up(task, kind)
    context = kind.make()
    prefill_seconds, _ = _timed(task, lambda: _read(task, kind, context))
    context_bytes = total_bytes([context])
    copies = [_timed(task, lambda: kind.copy(context)) for _ in task.prompts]
    asked = [_ask(task, prompt, cache, max_new_tokens) for prompt, (_, cache) in zip(task.prompts, copies, strict=True)]
    steps = [seconds for one in asked for seconds in one.steps]
    measurement = Measurement(
        cache=kind.name,
        answers=tuple(one.answer for one in asked),
        context_bytes=context_bytes,
        open_bytes=total_bytes([cache for _, cache in copies]),
        prefill_seconds=prefill_seconds,
        copy_seconds=statistics.median(seconds for seconds, _ in copies),
        token_seconds=statistics.median(steps) if steps else None,
    )
    return Run(measurement, context, tuple(one.logits for one in asked))


def total_bytes(caches: Sequence[Any]) -> int:
    """Return the live bytes of several caches, counting storages that they share once.

    For one `PiKVCache` this is `cache.nbytes`.
    """
    layers = [layer for cache in caches for layer in cache.layers]
    paged = [layer for layer in layers if isinstance(layer, PiKVLayer)]
    others = [layer for layer in layers if not isinstance(layer, PiKVLayer) and layer.is_initialized]
    tensors = [tensor for layer in paged for tensor in storages(layer.store)]
    tensors += [tensor for layer in others for tensor in (layer.keys, layer.values)]
    tables = [table for layer in paged for table in layer.store.tables()]
    stores = {id(table.pools): table.pools for table in tables}
    host = sum(pages.host_bytes for pages in stores.values()) + sum(table.host_bytes for table in tables)
    return live_bytes(tensors) + host


def largest_difference(ours: Run, theirs: Run) -> float:
    """Return the largest absolute difference of any logit, up to where two answers part."""
    answers = zip(ours.measurement.answers, theirs.measurement.answers, strict=True)
    steps = [first_difference(*pair) for pair in answers]
    gaps = []
    for step, one, other in zip(steps, ours.logits, theirs.logits, strict=True):
        common = min(len(one), len(other)) if step is None else step + 1
        gaps.append((one[:common] - other[:common]).abs().max().item())
    return max(gaps)


def first_difference(one: Answer, other: Answer) -> int | None:
    """Return the index of the first token in which two answers differ, None if they are the same."""
    if one.token_ids == other.token_ids:
        return None
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))


def _read(task: DemoTask, kind: CacheKind, cache: Any) -> None:
    with kind.reading():
        task.model(input_ids=task.context, **cache_argument(cache), logits_to_keep=1)


def _warm_up(task: DemoTask, kind: CacheKind) -> None:
    """Do once what is timed later: the first call of its size pays for memory that the next ones find ready."""
    cache = kind.make()
    _read(task, kind, cache)
    task.model(input_ids=task.context[:, :1], **cache_argument(cache), logits_to_keep=1)


def _timed(task: DemoTask, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result of a call."""
    _finish(task)
    start = time.perf_counter()
    result = call()
    _finish(task)
    return time.perf_counter() - start, result


def _finish(task: DemoTask) -> None:
    if task.context.is_cuda:
        torch.cuda.synchronize(task.context.device)


def _ask(task: DemoTask, prompt: Prompt, cache: Any, max_new_tokens: int) -> _Asked:
    clock = _TokenClock()
    ids = torch.cat([task.context, prompt.ids], dim=1)
    output = task.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=task.pad_token_id,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = output.sequences[0, ids.shape[1] :]
    text = task.tokenizer.decode(new, skip_special_tokens=True).strip()
    answer = Answer(text, tuple(new.tolist()), prompt.is_right(text))
    return _Asked(answer, torch.cat(output.logits).float().cpu(), clock.steps())
