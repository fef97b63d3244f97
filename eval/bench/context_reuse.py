"""Time what a store of contexts saves: first tokens after a known prefix, lookups, misses, and whole conversations."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache

from pikv_hf import ContextStore, PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.bench_table import _times, show
from pikv_hf.eval.bench.decode import geometry_model
from pikv_hf.eval.bench.press_prefill import dense_bytes
from pikv_hf.eval.bench.steps import small_model
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes
from pikv_hf.store.radix_tree import RadixTree

ENTRIES, ENTRY_TOKENS, SHARED = 10_000, 4096, 2048
CONVERSATIONS, TURNS, DOCUMENTS = 32, 8, 4
DOCUMENT, QUESTION, ANSWER = 1024, 24, 8
MISS, REPEATS = 1024, 7


@dataclasses.dataclass(frozen=True)
class ReuseTiming:
    """One thing that a store does, against the same without it.

    Attributes
    ----------
    what : str
        `memory` and `disk`: the first token of a prompt, all of which but one token is known, against reading it with
        `DynamicCache`; `lookup`: a prompt among many entries; `miss`: a prompt of which nothing is known, against
        `generate` with a `PiKVCache`; `conversations`: many turns over few documents, against `DynamicCache` without
        reuse, of which each conversation has one of its own at a time.
    tokens : int
        Of the prompt, or of all prompts.
    without, with_store : float
        Seconds, medians; for `lookup` the second alone.
    ratio : float or None
        `without` over `with_store`: above 1, the store is faster.
    nbytes, nbytes_without : int
        Live bytes of the store, and of the peer; 0 where that is not the question.
    """

    what: str
    tokens: int
    without: float
    with_store: float
    ratio: float | None
    nbytes: int = 0
    nbytes_without: int = 0


def run_store(
    prefixes: Sequence[int] = (8192, 32768), layers: int = 2, chunk: int = 4096, directory: Path | None = None
) -> Iterator[ReuseTiming]:
    """Time a store; yields a result at a time.

    Parameters
    ----------
    prefixes : sequence of int
        Known tokens, of a model with the attention geometry of Qwen3-30B-A3B and a small feed-forward: a whole model
        takes longer to read.
    layers : int
        Of that model.
    chunk : int
        Tokens that it reads at once.
    directory : Path, optional
        Where files go; by default a temporary directory.
    """
    yield _lookup()
    model = geometry_model(layers=layers)
    for tokens in prefixes:
        yield from _first_tokens(model, tokens, chunk, directory)
    small = small_model()
    # Answers are of one length.
    small.generation_config.eos_token_id = None
    yield _miss(small)
    yield _conversations(small)


def _lookup() -> ReuseTiming:
    draw = np.random.default_rng(0)
    documents = draw.integers(0, 50_000, (100, SHARED))
    tree: RadixTree[int] = RadixTree()
    entries = []
    for number in range(ENTRIES):
        own = draw.integers(0, 50_000, ENTRY_TOKENS - SHARED)
        entries.append(np.concatenate([documents[number % len(documents)], own]))
        tree.insert(entries[-1]).value = number
    seconds = []
    for entry in entries[:: ENTRIES // 1000]:
        started = time.perf_counter()
        known = tree.find(entry)[1]
        seconds.append(time.perf_counter() - started)
        assert known == ENTRY_TOKENS
    return ReuseTiming("lookup", ENTRY_TOKENS, 0.0, median(seconds), None)


@torch.no_grad()
def _first_tokens(model: Any, tokens: int, chunk: int, directory: Path | None) -> Iterator[ReuseTiming]:
    ids = torch.randint(2, model.config.vocab_size, (1, tokens + 1))
    started = time.perf_counter()
    peer = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        model(part, logits_to_keep=1, **cache_argument(peer))
    without, nbytes_without = time.perf_counter() - started, dense_bytes(peer)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        store = ContextStore(model, path=folder)
        cache, _ = store.get(ids)
        for part in ids[:, :tokens].split(chunk, dim=1):
            model(part, logits_to_keep=1, **cache_argument(cache))
        store.put(ids, cache)
        del cache
        for what in ("memory", "disk"):
            seconds = []
            for _ in range(REPEATS):
                if what == "disk":
                    store = ContextStore(model, path=folder)
                    # It takes the fingerprint of the model, once.
                    store.get(ids[:, :1])
                started = time.perf_counter()
                cache, known = store.get(ids, most=tokens)
                model(ids[:, known:], logits_to_keep=1, **cache_argument(cache))
                seconds.append(time.perf_counter() - started)
                assert known == tokens
            spent = median(seconds)
            yield ReuseTiming(what, tokens, without, spent, without / spent, store.nbytes, nbytes_without)


def _miss(model: Any) -> ReuseTiming:
    store = ContextStore(model, placement="hash")
    times: dict[bool, list[float]] = {True: [], False: []}
    # One after the other, so that what slows the machine slows both.
    for number, with_store in itertools.product(range(REPEATS), (False, True)):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(2, model.config.vocab_size, (1, MISS), generator=draw)
        started = time.perf_counter()
        if with_store:
            store.generate(ids, max_new_tokens=1, do_sample=False)
        else:
            cache = PiKVCache.for_model(model, placement="hash")
            model.generate(ids, max_new_tokens=1, do_sample=False, **cache_argument(cache))
        times[with_store].append(time.perf_counter() - started)
    # Of pairs: the first of either fills memory.
    ratios = [one / other for one, other in zip(times[False], times[True], strict=True)]
    return ReuseTiming("miss", MISS, median(times[False]), median(times[True]), median(ratios))


def _conversations(model: Any) -> ReuseTiming:
    draw = torch.Generator().manual_seed(1)

    def new(tokens: int) -> torch.Tensor:
        return torch.randint(2, model.config.vocab_size, (1, tokens), generator=draw)

    documents = [new(DOCUMENT) for _ in range(DOCUMENTS)]
    questions = [[new(QUESTION) for _ in range(TURNS)] for _ in range(CONVERSATIONS)]
    store = ContextStore(model, placement="hash")
    spent, nbytes, tokens = {True: 0.0, False: 0.0}, 0, 0
    for with_store in (False, True):
        for conversation, asked in enumerate(questions):
            history = documents[conversation % DOCUMENTS]
            for question in asked:
                history = torch.cat([history, question], dim=1)
                started = time.perf_counter()
                if with_store:
                    history = store.generate(history, max_new_tokens=ANSWER, do_sample=False)
                else:
                    cache = DynamicCache(config=model.config)
                    tokens += history.shape[1]
                    history = model.generate(history, max_new_tokens=ANSWER, do_sample=False, **cache_argument(cache))
                spent[with_store] += time.perf_counter() - started
            nbytes += 0 if with_store else dense_bytes(cache)
    ratio = spent[False] / spent[True]
    return ReuseTiming("conversations", tokens, spent[False], spent[True], ratio, store.nbytes, nbytes)


def run_and_show_store(timings: Iterable[ReuseTiming], threads: int, output: Path | None) -> None:
    """Run the benchmark, print it and write it down; see :func:`pikv_hf.eval.bench.bench_table.run_and_show`."""
    show(timings, threads, output, _line, _table)


def _line(each: ReuseTiming) -> str:
    faster = f"{each.with_store:.2e} s" if each.ratio is None else _times(each.ratio)
    return f"{each.what}, {each.tokens:,} tokens: {faster}"


def _table(done: list[ReuseTiming]) -> Table:
    table = FittingTable(
        title="Seconds without and with a store of contexts; ratios: times faster with it",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "tokens", "without", "with", "ratio", "bytes without", "with"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for each in done:
        table.add_row(
            each.what,
            f"{each.tokens:,}",
            f"{each.without:.2f}" if each.without else "",
            f"{each.with_store:.5f}" if each.with_store < 0.1 else f"{each.with_store:.2f}",
            "" if each.ratio is None else _times(each.ratio),
            format_bytes(each.nbytes_without) if each.nbytes_without else "",
            format_bytes(each.nbytes) if each.nbytes else "",
        )
    return table
