"""Time loading a saved cache against reading its context again, in one run."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.bench_table import _times, show
from pikv_hf.eval.bench.decode import Timing, geometry_model, timed
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes

NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class LoadTiming:
    """Saving and loading the cache of one context.

    Attributes
    ----------
    codec : str
        Of keys and values.
    tokens, layers : int
        Of the context and the model.
    chunk : int
        Tokens per call of the model while the context is read; `tokens` if all at once.
    prefill : float
        Seconds to read the context once, until its tokens are stored.
    save : Timing
        Seconds to write the file and wait until it is on disk.
    load : Timing
        Seconds to load a file that the system still has in memory, all checks and the model's fingerprint included.
    load_cold : Timing
        The same after the system was asked to forget the file.
    ratio, ratio_cold : float
        `prefill` over the medians of `load` and `load_cold`: above 1, loading is faster.
    kv_bytes, loaded_bytes, file_bytes : int
        Live bytes of the cache that was saved and of the one that was loaded, and of the file.
    same_tokens : bool
        Whether both go on with the same tokens, chosen greedily.
    max_difference : float
        Largest absolute difference of their logits.
    """

    codec: str
    tokens: int
    layers: int
    chunk: int
    prefill: float
    save: Timing
    load: Timing
    load_cold: Timing
    ratio: float
    ratio_cold: float
    kv_bytes: int
    loaded_bytes: int
    file_bytes: int
    same_tokens: bool
    max_difference: float


@torch.no_grad()
def run_load(
    tokens: int = 32768,
    codecs: Sequence[str] = ("none", "int4"),
    layers: int = 2,
    repeats: int = 5,
    chunk: int | None = None,
    directory: Path | None = None,
) -> Iterator[LoadTiming]:
    """Time reading a context once, and saving and loading its cache.

    Parameters
    ----------
    tokens : int
        Of the context.
    codecs : sequence of str
        A case for each.
    layers : int
        Of the model, whose attention has the geometry of Qwen3-30B-A3B and whose feed-forward is small: reading a
        context costs a whole model far more.
    repeats : int
        Times that a file is saved and loaded.
    chunk : int, optional
        Tokens per call while the context is read; by default all.
    directory : Path, optional
        Where the file goes; by default a temporary directory.
    """
    model = geometry_model(layers=layers)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        for codec in codecs:
            yield _case(model, ids, codec, repeats, chunk or tokens, Path(folder) / "cache.safetensors")


def _case(model: Any, ids: torch.Tensor, codec: str, repeats: int, chunk: int, path: Path) -> LoadTiming:
    cache = PiKVCache.for_model(model, key_codec=codec, value_codec=codec)
    prefill, last = timed(_read, model, cache, ids, chunk)
    times: dict[str, list[float]] = {"save": [], "load": [], "load_cold": []}
    for _ in range(repeats):
        times["save"].append(timed(cache.save, path)[0])
        times["load"].append(timed(PiKVCache.load, path, model)[0])
        _forget(path)
        spent, loaded = timed(PiKVCache.load, path, model)
        times["load_cold"].append(spent)
    sizes = cache.nbytes, loaded.nbytes, path.stat().st_size
    ours, theirs = (_go_on(model, each, last) for each in (cache, loaded))
    timings = {name: Timing.of(seconds) for name, seconds in times.items()}
    return LoadTiming(
        codec,
        ids.shape[1],
        model.config.num_hidden_layers,
        chunk,
        prefill,
        **timings,
        ratio=prefill / timings["load"].p50,
        ratio_cold=prefill / timings["load_cold"].p50,
        kv_bytes=sizes[0],
        loaded_bytes=sizes[1],
        file_bytes=sizes[2],
        same_tokens=torch.equal(ours.argmax(dim=-1), theirs.argmax(dim=-1)),
        max_difference=float((ours - theirs).abs().max()),
    )


def _read(model: Any, cache: PiKVCache, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Read a context; returns the next token, `(1, 1)`."""
    for part in ids.split(chunk, dim=1):
        out = model(part, **cache_argument(cache), logits_to_keep=1)
    # The last layer stores its tokens when they are asked for.
    cache.memory_report()
    return out.logits[:, -1].argmax(dim=-1, keepdim=True)


def _go_on(model: Any, cache: PiKVCache, token: torch.Tensor) -> torch.Tensor:
    """Return the logits of the next tokens, chosen greedily, `(NEW_TOKENS, V)`."""
    logits = []
    for _ in range(NEW_TOKENS):
        logits.append(model(token, **cache_argument(cache)).logits[:, -1])
        token = logits[-1].argmax(dim=-1, keepdim=True)
    return torch.cat(logits)


def _forget(path: Path) -> None:
    """Ask the system to drop a file from memory, which it does on Linux for what is on disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run_and_show_loads(timings: Iterable[LoadTiming], threads: int, output: Path | None) -> None:
    """Run the benchmark, print it and write it down; see :func:`pikv_hf.eval.bench.bench_table.run_and_show`."""
    show(timings, threads, output, _line, _table)


def _line(each: LoadTiming) -> str:
    return f"{each.codec}, {each.tokens:,} tokens: loading is {_times(each.ratio)} as fast as reading them"


def _table(done: list[LoadTiming]) -> Table:
    table = FittingTable(
        title="Seconds to read a context, to save and load its cache (medians); ratios: times faster than reading",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("codec", "tokens", "read", "save", "load", "ratio", "cold", "ratio", "cache", "file", "same"):
        table.add_column(name, justify="left" if name == "codec" else "right", no_wrap=True)
    for each in done:
        table.add_row(
            each.codec,
            f"{each.tokens:,}",
            f"{each.prefill:,.1f}",
            f"{each.save.p50:.2f}",
            f"{each.load.p50:.2f}",
            _times(each.ratio),
            f"{each.load_cold.p50:.2f}",
            _times(each.ratio_cold),
            format_bytes(each.kv_bytes),
            format_bytes(each.file_bytes),
            "yes" if each.same_tokens else "no",
        )
    return table
