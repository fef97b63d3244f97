"""Measure the bandwidth of the kernels beside attention, with the geometry of Qwen3-30B-A3B."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pikv_hf.eval.gpu.arena import fill_random, pages_bytes, random_pages
from pikv_hf.eval.gpu.checks import reason, why_red
from pikv_hf.eval.gpu.copy_speed import PAGE_SIZE, Bench, gb_per_s, obstacle
from pikv_hf.eval.gpu.geometry import GEOMETRIES, scattered_table, table_bytes
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels import append_tokens, gather_pages, merge_partials, page_scores
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import KINDS, SPREAD_ONE, Kind

HEADS, DIM = GEOMETRIES[0].kv_heads, GEOMETRIES[0].dim

#: Parts that are merged.
PARTS = 8

#: The bytes a call moves, and the call.
Prepared = tuple[int, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Rows and tokens of the pages that are encoded and gathered, and of the larger pool that is scored."""

    batch: int = 8
    tokens: int = 32768
    scored_batch: int = 32
    scored_tokens: int = 131072


@dataclasses.dataclass(frozen=True, slots=True)
class PageSpeed:
    """What was measured of an operation; figures are None where `note` says why.

    Attributes
    ----------
    operation, kind : str
        What was measured; the kind is that of the pages.
    case : str
        Sizes.
    bytes_moved : int or None
        Bytes read plus bytes written.
    timing : Timing or None
        Of the kernel.
    gb_per_s, copy_share : float or None
        `bytes_moved` per second of the median, and its share of the copy bandwidth.
    note : str
        Why there is no figure.
    failed : bool
        Whether that is because the kernel failed, rather than for want of time.
    """

    operation: str
    kind: str
    case: str
    bytes_moved: int | None = None
    timing: Timing | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    note: str = ""
    failed: bool = False


def page_speeds(
    bench: Bench, red: set[tuple[str, str]], time_limit: TimeLimit, sizes: Sizes | None = None
) -> Iterator[PageSpeed]:
    """Measure encoding, gathering and scoring; see :func:`~pikv_hf.eval.gpu.attention_speed.attention_speeds`."""
    sizes = sizes or Sizes()
    for kind in KINDS[1:]:
        for keys in (True, False):
            case = PageSpeed(
                "encode_pages", kind, f"{'keys' if keys else 'values'}, {sizes.batch} x {sizes.tokens} tokens"
            )
            yield _speed(bench, case, red, time_limit, functools.partial(_encode, bench, sizes, kind, keys=keys))
    for kind in KINDS:
        case = PageSpeed("gather_pages", kind, f"keys, {sizes.batch} x {sizes.tokens} tokens")
        yield _speed(bench, case, red, time_limit, functools.partial(_gather, bench, sizes, kind))
    case = PageSpeed("page_scores", "-", f"spread codes, {sizes.scored_batch} x {sizes.scored_tokens} tokens")
    yield _speed(bench, case, red, time_limit, functools.partial(_score, bench, sizes))
    case = PageSpeed("append_tokens", "-", f"keys, {sizes.batch} x {sizes.tokens} tokens")
    yield _speed(bench, case, red, time_limit, functools.partial(_append, bench, sizes))
    case = PageSpeed("merge_partials", "-", f"{PARTS} parts of {sizes.tokens} queries")
    yield _speed(bench, case, red, time_limit, functools.partial(_merge, bench, sizes))


def _speed(
    bench: Bench, case: PageSpeed, red: set[tuple[str, str]], time_limit: TimeLimit, prepare: Callable[[], Prepared]
) -> PageSpeed:
    red_check = why_red(red, case.operation, case.kind)
    if note := red_check or obstacle(bench, 0, time_limit):
        return dataclasses.replace(case, note=note, failed=bool(red_check))
    bench.arena.reset()
    try:
        size, call = prepare()
        timing = bench.stopwatch(call)
    except Exception as failure:  # As in a check: whatever a kernel raises, the other cases go on.
        return dataclasses.replace(case, note=reason(failure), failed=True)
    speed = gb_per_s(size, timing)
    share = speed / bench.copy_gb_per_s
    return dataclasses.replace(case, bytes_moved=size, timing=timing, gb_per_s=speed, copy_share=share)


def _encode(bench: Bench, sizes: Sizes, kind: Kind, *, keys: bool) -> Prepared:
    pages = sizes.batch * sizes.tokens // PAGE_SIZE
    tokens = fill_random(bench.arena.take(HEADS, pages, PAGE_SIZE, DIM, dtype=torch.bfloat16))
    written = pages_bytes(kind, HEADS, pages, PAGE_SIZE, DIM, keys=keys)
    return tokens.nbytes + written, lambda: encode_pages(tokens, kind, keys=keys, backend=bench.backend)


def _gather(bench: Bench, sizes: Sizes, kind: Kind) -> Prepared:
    page_table = scattered_table(sizes.batch, sizes.tokens // PAGE_SIZE, bench.device)
    pages = len(page_table.counts)
    codes = random_pages(bench.arena, kind, HEADS, pages, PAGE_SIZE, DIM, keys=True)
    size = pages_bytes(kind, HEADS, pages, PAGE_SIZE, DIM, keys=True) + table_bytes(page_table)
    size += pages_bytes("none", HEADS, pages, PAGE_SIZE, DIM, keys=True)
    numbers = (page_table.entries, page_table.lengths, page_table.counts)
    return size, lambda: gather_pages(codes, *numbers, torch.bfloat16, backend=bench.backend)


def _score(bench: Bench, sizes: Sizes) -> Prepared:
    page_table = scattered_table(sizes.scored_batch, sizes.scored_tokens // PAGE_SIZE, bench.device)
    shape = (HEADS, len(page_table.counts), DIM)
    low = fill_random(bench.arena.take(*shape, dtype=torch.float16))
    high = bench.arena.take(*shape, dtype=torch.uint8).fill_(SPREAD_ONE)
    query_heads = GEOMETRIES[0].query_heads
    query = torch.randn(sizes.scored_batch, query_heads, DIM, dtype=torch.bfloat16, device=bench.device)
    scores = 4 * HEADS * page_table.entries.numel()
    size = low.nbytes + high.nbytes + page_table.entries.nbytes + page_table.lengths.nbytes + scores
    return size, lambda: page_scores(query, low, high, page_table.entries, page_table.lengths, backend=bench.backend)


def _append(bench: Bench, sizes: Sizes) -> Prepared:
    pages = sizes.batch * sizes.tokens // PAGE_SIZE
    pool = bench.arena.take(HEADS, pages, PAGE_SIZE, DIM, dtype=torch.bfloat16)
    tokens = fill_random(bench.arena.take(HEADS, pages * PAGE_SIZE, DIM, dtype=torch.bfloat16))
    slots = torch.randperm(pages * PAGE_SIZE, device=bench.device)
    return 2 * tokens.nbytes + slots.nbytes, lambda: append_tokens(pool, slots, tokens, backend=bench.backend)


def _merge(bench: Bench, sizes: Sizes) -> Prepared:
    query_heads = GEOMETRIES[0].query_heads
    outs = fill_random(bench.arena.take(PARTS, sizes.tokens, query_heads, DIM, dtype=torch.float32))
    lses = torch.randn(PARTS, sizes.tokens, query_heads, device=bench.device)
    moved = (outs.nbytes + lses.nbytes) * (PARTS + 1) // PARTS
    return moved, lambda: merge_partials(outs, lses, backend=bench.backend)
