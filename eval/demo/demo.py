"""The demo: one context read once, several questions, the same answers from `DynamicCache` and `PiKVCache`."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils import logging

import pikv_hf
from pikv_hf import PiKVCache, attach
from pikv_hf.eval.demo.measure import (
    Measurement,
    dynamic_cache,
    first_difference,
    largest_difference,
    make_pikv,
    measure,
    pikv_cache,
)
from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.demo.routing_recorder import record_trace
from pikv_hf.eval.demo.task import DemoTask, build_task
from pikv_hf.eval.errors import user_input
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.planning.simulate.routing_trace import save_trace
from pikv_hf.reports.cache_stats import CacheStats
from pikv_hf.reports.memory_report import LayerMemory


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpread:
    """Where a layer's tokens are after the context has been read.

    Attributes
    ----------
    layer : int
        The model layer.
    window_tokens : int
        Tokens in the sink and recent pages, which belong to no shard yet.
    shard_tokens : tuple of int
        Tokens of each shard.
    expert_tokens : tuple of int
        Tokens of each primary expert, the window's included; empty if the layer does not follow a router.
    """

    layer: int
    window_tokens: int
    shard_tokens: tuple[int, ...]
    expert_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Disagreement:
    """The caches' answers to question number `question` differ from token number `token` on, both from 0."""

    question: int
    token: int


@dataclasses.dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    model, model_type, dtype, device : str
        Name and kind of the model, and where it ran.
    options : DemoOptions
        What was asked for.
    versions : dict of str to str
        Of pikv_hf, torch and transformers.
    context_tokens : int
        Tokens of the context, which is read once.
    questions : tuple of str
        As asked.
    expected : tuple of str or None
        Right answers, where known.
    dynamic, pikv : Measurement
        The two caches.
    logit_difference : float
        Largest absolute difference of any logit between the caches, up to where two answers part.
    disagreements : tuple of Disagreement
        Where answers differ.
    spread : tuple of LayerSpread
        Where PiKV put the context's tokens; paged layers only.
    per_device : dict of str to int
        Bytes of PiKV's cache by device, with what it shares with all questions' copies.
    stats : CacheStats
        What PiKV's routing read, its scheduler evicted and its tiers moved, over all questions' copies.
    """

    model: str
    model_type: str
    dtype: str
    device: str
    options: DemoOptions
    versions: dict[str, str]
    context_tokens: int
    questions: tuple[str, ...]
    expected: tuple[str | None, ...]
    dynamic: Measurement
    pikv: Measurement
    logit_difference: float
    disagreements: tuple[Disagreement, ...]
    spread: tuple[LayerSpread, ...]
    per_device: dict[str, int]
    stats: CacheStats

    @property
    def agree(self) -> bool:
        """Whether both caches gave the same tokens for every question."""
        return not self.disagreements

    def describe_disagreement(self) -> str:
        """Return one line about where the answers part."""
        first = self.disagreements[0]
        hint = "" if self.dtype == "float32" else f"; rounding of {self.dtype} can do that, --dtype float32 tells"
        return (
            f"the caches' answers differ for {len(self.disagreements)} of {len(self.questions)} questions, first for "
            f"question {first.question + 1} at token {first.token + 1}{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        options = dataclasses.asdict(self.options)
        paths = {name: options[name] for name in ("text", "record_trace")}
        return {
            **dataclasses.asdict(self),
            "options": {**options, **{name: None if path is None else str(path) for name, path in paths.items()}},
            "agree": self.agree,
        }


def run_demo(options: DemoOptions) -> DemoResult:
    """Answer the questions with both caches and compare them.

    Raises
    ------
    InputError
        If something the user gave is missing, unknown or does not fit; see :func:`build_task`.
    """
    torch.set_num_threads(options.threads)
    with _quiet_transformers():
        task = build_task(options)
        _check_supported(task, options)
        # Before attaching: the baseline is the model as it is loaded, with transformers' own attention.
        dynamic = measure(task, dynamic_cache(task.model), options.max_new_tokens)
        with attach(task.model, options.pikv.placement or "expert") as attached:
            kind = pikv_cache(task.model, options.pikv, options.cache_devices)
            pikv = measure(task, kind, options.max_new_tokens)
            if options.record_trace is not None:
                trace = record_trace(task, kind, attached.expert_routers, options.max_new_tokens)
                with user_input(f"cannot write --record-trace {options.record_trace}"):
                    save_trace(trace, options.record_trace)
    pairs = zip(pikv.measurement.answers, dynamic.measurement.answers, strict=True)
    parted = [(index, first_difference(ours, theirs)) for index, (ours, theirs) in enumerate(pairs)]
    return DemoResult(
        model=task.name,
        model_type=task.model.config.model_type,
        dtype=str(task.model.dtype).removeprefix("torch."),
        device=str(task.context.device),
        options=options,
        versions=versions(),
        context_tokens=task.context.shape[1],
        questions=tuple(prompt.question for prompt in task.prompts),
        expected=tuple(None if prompt.sample is None else prompt.sample.answer for prompt in task.prompts),
        dynamic=dynamic.measurement,
        pikv=pikv.measurement,
        logit_difference=largest_difference(pikv, dynamic),
        disagreements=tuple(Disagreement(question, token) for question, token in parted if token is not None),
        spread=tuple(token_spread(pikv.context)),
        per_device=pikv.context.memory_report().per_device,
        stats=pikv.context.stats(),
    )


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"pikv_hf": pikv_hf.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def token_spread(cache: PiKVCache) -> Iterator[LayerSpread]:
    """Yield how each paged layer's tokens spread over shards and experts."""
    parts: dict[int, list[LayerMemory]] = {}
    for part in cache.memory_report().layers:
        parts.setdefault(part.layer, []).append(part)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PiKVLayer):
            of_shards = np.sum([part.shard_tokens for part in parts[index]], axis=0)
            stored = sum(part.tokens_stored for part in parts[index])
            shards = tuple(int(tokens) for tokens in np.atleast_1d(of_shards))
            yield LayerSpread(index, stored - sum(shards), shards, _expert_tokens(layer))


def _expert_tokens(layer: PiKVLayer) -> tuple[int, ...]:
    if not layer.has_expert_router or layer.attachment is None or layer.table is None:
        return ()
    counts = np.zeros(layer.attachment.expert_routers[layer.layer_idx].num_experts, dtype=np.int64)
    for table in layer.tables():
        pool, held = table.plain, table.distinct_pages()
        if not table.writer.reads_window:
            held = held[pool.shard[held] >= 0]
        experts, positions = (tensor.cpu().numpy()[held] for tensor in (pool.experts, pool.positions))
        counts += np.bincount(experts[(positions >= 0) & (experts >= 0)], minlength=len(counts))
    return tuple(counts.tolist())


def _check_supported(task: DemoTask, options: DemoOptions) -> None:
    """Refuse a model that PiKV cannot serve before the baseline takes its time."""
    with user_input(f"cannot use {task.name} with PiKVCache"), attach(task.model, options.pikv.placement or "expert"):
        make_pikv(task.model, options.pikv, options.cache_devices)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal for a while."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
