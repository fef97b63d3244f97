"""Measure a long generation, and a prompt in chunks, under a budget: do memory and time stay what they are?"""

import dataclasses
import functools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.bench_table import show
from pikv_hf.eval.bench.decode import geometry_model, timed
from pikv_hf.eval.runner.memory_meter import stored_bytes
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes

# Steps whose times are averaged: those after the first STEPS, and the last.
STEPS = 512


@dataclasses.dataclass(frozen=True)
class GenerationTiming:
    """One cache through a long generation.

    Attributes
    ----------
    cache : str
        Its options.
    prompt, tokens, layers : int
        Prompt and generated tokens, and layers of the model.
    early, late : float
        Mean seconds of a step: after the first 512, for 512 steps, and of the last 512.
    growth : float
        `late / early`.
    early_bytes, most_bytes, final_bytes : int
        Live bytes of the cache after 512 steps, the most that they were later, and at the end.
    """

    cache: str
    prompt: int
    tokens: int
    layers: int
    early: float
    late: float
    growth: float
    early_bytes: int
    most_bytes: int
    final_bytes: int


@dataclasses.dataclass(frozen=True)
class ChunkedPrefill:
    """A prompt read in chunks under a budget.

    Attributes
    ----------
    cache : str
        Its options.
    tokens, chunk, layers : int
        Of the prompt, per call, and layers of the model.
    seconds : float
        For all of it.
    full_bytes : int
        Keys and values of the whole prompt, in the model's dtype.
    peak_bytes, final_bytes : int
        Live bytes of the cache: the most of all moments between layers and chunks, new tokens that wait to be stored
        included, and at the end.
    peak_share : float
        `peak_bytes / full_bytes`.
    """

    cache: str
    tokens: int
    chunk: int
    layers: int
    seconds: float
    full_bytes: int
    peak_bytes: int
    final_bytes: int
    peak_share: float


@torch.no_grad()
def run_generation(
    tokens: int = 4096, prompt: int = 1024, budget: int = 1024, schedulers: Sequence[str] = ("pikv",), layers: int = 1
) -> Iterator[GenerationTiming]:
    """Generate with `DynamicCache`, and under a budget of so many tokens with each scheduler.

    Raises
    ------
    ValueError
        If fewer than 1,024 tokens are to be generated.
    """
    if tokens < 2 * STEPS:
        raise ValueError(f"at least {2 * STEPS} tokens are compared, got {tokens}")
    model = geometry_model(layers=layers)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt))
    yield _generate(model, "DynamicCache", DynamicCache(config=model.config), ids, tokens)
    for scheduler in schedulers:
        cache = PiKVCache.for_model(model, budget=budget, scheduler=scheduler)
        yield _generate(model, f"{scheduler}, {budget:,} tokens", cache, ids, tokens)
        detach(model)


def _generate(model: Any, name: str, cache: Any, ids: torch.Tensor, tokens: int) -> GenerationTiming:
    prompt, seconds, sizes = ids.shape[1], [], []
    for step in range(tokens):
        spent, out = timed(model, ids, **cache_argument(cache), logits_to_keep=1)
        seconds.append(spent)
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        if step >= STEPS and step % 32 == 0:
            sizes.append(stored_bytes(cache))
    sizes.append(stored_bytes(cache))
    early, late = statistics.fmean(seconds[STEPS : 2 * STEPS]), statistics.fmean(seconds[-STEPS:])
    layers = model.config.num_hidden_layers
    return GenerationTiming(name, prompt, tokens, layers, early, late, late / early, sizes[0], max(sizes), sizes[-1])


@torch.no_grad()
def run_chunks(
    tokens: int = 32768, chunk: int = 1024, budget: float = 0.25, schedulers: Sequence[str] = ("pikv",), layers: int = 2
) -> Iterator[ChunkedPrefill]:
    """Read a prompt of random tokens in chunks under a budget that is a share of it."""
    model = geometry_model(layers=layers)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    for scheduler in schedulers:
        cache = PiKVCache.for_model(model, budget=budget, scheduler=scheduler)
        seen: list[int] = []
        note = functools.partial(_note, cache, seen)
        hooks = [layer.self_attn.register_forward_hook(note) for layer in model.model.layers]
        hooks += [layer.register_forward_hook(note) for layer in model.model.layers]
        seconds, _ = timed(_read, model, cache, ids, chunk)
        for hook in hooks:
            hook.remove()
        config = model.config
        full = (
            tokens * layers * 2 * config.num_key_value_heads * config.head_dim * next(model.parameters()).element_size()
        )
        peak, final = max(seen), cache.nbytes
        yield ChunkedPrefill(
            f"{scheduler}, {budget:.0%}", tokens, chunk, layers, seconds, full, peak, final, peak / full
        )
        detach(model)


def _read(model: Any, cache: PiKVCache, ids: torch.Tensor, chunk: int) -> None:
    for part in ids.split(chunk, dim=1):
        model(part, **cache_argument(cache), logits_to_keep=1)
        cache.memory_report()


def _note(cache: PiKVCache, seen: list[int], *_: Any) -> None:
    seen.append(stored_bytes(cache))


def run_and_show_generation(timings: Iterable[GenerationTiming], threads: int, output: Path | None) -> None:
    """Run the benchmark, print it and write it down; see :func:`pikv_hf.eval.bench.bench_table.run_and_show`."""
    show(timings, threads, output, _generation_line, _generation_table)


def run_and_show_chunks(timings: Iterable[ChunkedPrefill], threads: int, output: Path | None) -> None:
    """The same for prompts in chunks."""
    show(timings, threads, output, _chunks_line, _chunks_table)


def _generation_line(each: GenerationTiming) -> str:
    return f"{each.cache}: the last steps take {each.growth:.2f} of the time of the early ones"


def _generation_table(done: list[GenerationTiming]) -> Table:
    table = _table("A long generation: ms per step, early and late; live bytes", "cache", "tokens", "early", "late")
    for name in ("ratio", "bytes", "most", "at the end"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in done:
        sizes = (each.early_bytes, each.most_bytes, each.final_bytes)
        times = f"{each.early * 1e3:.2f}", f"{each.late * 1e3:.2f}", f"{each.growth:.2f}"
        table.add_row(each.cache, f"{each.prompt:,} + {each.tokens:,}", *times, *map(format_bytes, sizes))
    return table


def _chunks_line(each: ChunkedPrefill) -> str:
    return f"{each.cache}: at most {each.peak_share:.1%} of the bytes of the full cache"


def _chunks_table(done: list[ChunkedPrefill]) -> Table:
    table = _table("A prompt in chunks under a budget: live bytes", "cache", "tokens", "chunk", "seconds")
    for name in ("full", "peak", "share", "at the end"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in done:
        sizes = format_bytes(each.full_bytes), format_bytes(each.peak_bytes), f"{each.peak_share:.1%}"
        figures = f"{each.tokens:,}", f"{each.chunk:,}", f"{each.seconds:.1f}"
        table.add_row(each.cache, *figures, *sizes, format_bytes(each.final_bytes))
    return table


def _table(title: str, *names: str) -> Table:
    table = FittingTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    return table
