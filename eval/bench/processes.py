"""Measure a cache that several processes keep together, its speed, memory and traffic, against one process."""

import dataclasses
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from pikv_hf import PiKVCache
from pikv_hf.eval.bench.bench_table import show
from pikv_hf.eval.bench.decode import HEAD_DIM, KV_HEADS, QUERY_HEADS, Timing, geometry_model, timed
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes

_EXPERTS = 32


@dataclasses.dataclass(frozen=True)
class ProcessCase:
    """One context: a decoding step of one layer, by one process and by several.

    Attributes
    ----------
    processes, batch, tokens : int
        Gloo processes of one thread each, rows, and cached tokens.
    alone, together : Timing
        Seconds per step of one process, the others idle, and of all, as the first of them sees it.
    ratio : float
        Median of `alone` over median of `together`: above 1, sharding saves time.
    merge_seconds : float
        Median of a step of `together` that is spent in the collective, waiting included.
    bytes_sent : int
        Per token and layer: what each other process receives of one process's result.
    bytes_alone, bytes_each : int
        Live bytes of the cache, and of the largest part.
    max_difference : float
        Largest absolute difference of the two outputs.
    """

    processes: int
    batch: int
    tokens: int
    alone: Timing
    together: Timing
    ratio: float
    merge_seconds: float
    bytes_sent: int
    bytes_alone: int
    bytes_each: int
    max_difference: float


def run_processes(
    processes: int, contexts: Sequence[int], batches: Sequence[int], seconds: float = 4.0
) -> Iterator[ProcessCase]:
    """Time decoding steps; keys and values are random, and tokens are in shards of random experts.

    Parameters
    ----------
    processes : int
        How many share the cache, each with one CPU thread.
    contexts, batches : sequence of int
        Cached tokens, and rows.
    seconds : float
        Time to spend on each way of each case.
    """
    for tokens in contexts:
        for batch in batches:
            with tempfile.TemporaryDirectory() as folder:
                _run_all(processes, (processes, batch, tokens, seconds, folder))
                yield torch.load(Path(folder) / "case.pt", weights_only=False)


def _run_all(processes: int, arguments: tuple[Any, ...]) -> None:
    """Run `_measure` in all processes. Ctrl-C reaches this process alone, whose end is theirs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        running = spawn(_measure, args=arguments, nprocs=processes, join=False, daemon=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not running.join():
        pass


@torch.no_grad()
def _measure(rank: int, processes: int, batch: int, tokens: int, seconds: float, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = geometry_model()
    keys, values = (torch.randn(batch, KV_HEADS, tokens, HEAD_DIM) for _ in range(2))
    experts = torch.randint(0, _EXPERTS, (batch * tokens,))
    shared = _filled(PiKVCache.for_model(model, process_group="world"), keys, values, experts)
    whole = _filled(PiKVCache.for_model(model), keys, values, experts) if rank == 0 else None
    del keys, values
    attention = model.model.layers[0].self_attn
    exchange = shared.layers[0].layout.exchange
    steps = [_inputs(batch) for _ in range(64)]
    alone: list[float] = []
    outs: list[torch.Tensor] = []
    if whole is not None:
        # As many steps as fit into the time, at least one that fills a page.
        started = time.perf_counter()
        while len(alone) < 34 or (time.perf_counter() - started < seconds and len(alone) < len(steps)):
            spent, out = timed(_step, whole, attention, *steps[len(alone)])
            alone.append(spent)
            outs.append(out)
    count = [len(alone)]
    dist.broadcast_object_list(count)
    together, waits, difference = [], [], 0.0
    for index in range(count[0]):
        dist.barrier()
        before, waited = exchange.bytes_sent, exchange.seconds
        spent, out = timed(_step, shared, attention, *steps[index])
        together.append(spent)
        waits.append(exchange.seconds - waited)
        sent = exchange.bytes_sent - before
        if outs:
            difference = max(difference, float((out - outs[index]).abs().max()))
    sizes: list[Any] = [None] * processes
    dist.all_gather_object(sizes, shared.nbytes)
    if whole is not None:
        one, many = Timing.of(alone[2:]), Timing.of(together[2:])
        merging = Timing.of(waits[2:]).p50
        case = ProcessCase(
            *(processes, batch, tokens, one, many, one.p50 / many.p50, merging),
            *(sent // batch, whole.nbytes, max(sizes), difference),
        )
        torch.save(case, Path(folder) / "case.pt")
    dist.barrier()
    dist.destroy_process_group()


def _filled(cache: PiKVCache, keys: torch.Tensor, values: torch.Tensor, experts: torch.Tensor) -> PiKVCache:
    cache.layers[0].update_from_attention(keys, values)
    cache.layers[0].attend_begins(None)
    cache.layers[0].record_experts(experts)
    return cache


def _inputs(batch: int) -> tuple[torch.Tensor, ...]:
    tokens = [torch.randn(batch, heads, 1, HEAD_DIM) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    return (*tokens, torch.randint(0, _EXPERTS, (batch,)))


def _step(
    cache: PiKVCache, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    keys, values = cache.layers[0].update_from_attention(key, value)
    out, _ = pikv_attention_forward(attention, query, keys, values, None, scaling=attention.scaling)
    cache.layers[0].record_experts(experts)
    return out


def run_and_show_processes(cases: Iterator[ProcessCase], output: Path | None) -> None:
    """Run the benchmark, print it and write it down."""
    show(cases, 1, output, _line, _table)


def _line(each: ProcessCase) -> str:
    return f"batch {each.batch}, {each.tokens:,} tokens: {each.ratio:.2f}x with {each.processes} processes"


def _table(done: list[ProcessCase]) -> Table:
    table = FittingTable(
        title="Median milliseconds of a step of one layer, one thread per process; ratio: times faster together\n"
        "bytes sent: per token and layer, by each process to each other",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in (
        "batch",
        "tokens",
        "1",
        "together",
        "merging",
        "ratio",
        "bytes sent",
        "bytes of 1",
        "of each",
        "differs",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for each in done:
        table.add_row(
            str(each.batch),
            f"{each.tokens:,}",
            f"{each.alone.p50 * 1e3:,.2f}",
            f"{each.together.p50 * 1e3:,.2f}",
            f"{each.merge_seconds * 1e3:,.2f}",
            f"{each.ratio:.2f}x",
            f"{each.bytes_sent:,}",
            format_bytes(each.bytes_alone),
            format_bytes(each.bytes_each),
            f"{each.max_difference:.0e}",
        )
    return table
