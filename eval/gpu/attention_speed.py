"""Measure the bandwidth of `paged_decode_attention`, and its time beside dense attention in bf16."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from pikv_hf.eval.gpu.arena import random_pages
from pikv_hf.eval.gpu.checks import Outcome, bound_of, max_difference, reason, why_red
from pikv_hf.eval.gpu.copy_speed import PAGE_SIZE, Bench, gb_per_s, obstacle
from pikv_hf.eval.gpu.dense import DenseSpeed, dense_speed
from pikv_hf.eval.gpu.geometry import Shape, scattered_table
from pikv_hf.eval.gpu.references import PageTable, attended
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels import paged_decode_attention
from pikv_hf.kernels.page_codes import Kind, PageCodes

OPERATION = "paged_decode_attention"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """The inputs of a case, on the device."""

    query: torch.Tensor
    keys: PageCodes
    values: PageCodes
    page_table: PageTable
    scale: float
    absorbed: bool = False

    def run(self, backend: str, tuning: dict[str, int] | None = None) -> tuple[torch.Tensor, ...]:
        """Call the kernel."""
        return paged_decode_attention(
            self.query,
            self.keys,
            self.values,
            self.page_table.entries,
            self.page_table.lengths,
            self.page_table.counts,
            self.scale,
            absorbed=self.absorbed,
            backend=backend,
            tuning=tuning,
        )

    def operands(self) -> tuple[torch.Tensor, PageCodes, PageCodes, PageTable, float]:
        """Return the query, keys, values, page table and scale."""
        return self.query, self.keys, self.values, self.page_table, self.scale

    def lane(self, row: int, head: int) -> "Problem":
        """Return the part of one row and one KV head, views of this."""
        group = self.query.shape[1] // self.keys.heads
        query = self.query[row : row + 1, head * group : (head + 1) * group]
        keys, values = (codes.map(lambda part: part[head : head + 1]) for codes in (self.keys, self.values))
        page_table = self.page_table
        rows = PageTable(page_table.entries[row : row + 1], page_table.lengths[row : row + 1], page_table.counts)
        return Problem(query, keys, values, rows, self.scale, self.absorbed)


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionSpeed:
    """What was measured of a case; figures are None where `note` says why.

    Attributes
    ----------
    geometry, query_heads, kv_heads, dim, value_dim, tokens, batch, kind : str or int
        The case.
    bytes_read : int
        Bytes of all tensors of the pages, of the table, the counts and the lengths.
    timing : Timing or None
        Of the kernel.
    gb_per_s, copy_share : float or None
        `bytes_read` per second of the median, and its share of the copy bandwidth.
    max_error, bound : float or None
        Of two lanes of this very case, against float64.
    sdpa_backend, sdpa_ms, sdpa_ratio : str, float or None
        Dense attention in bf16, and how many times as long it takes as the kernel.
    sdpa_tried : dict or None
        Milliseconds of every backend of dense attention, or why it did not run.
    note : str
        Why there is no figure.
    failed : bool
        Whether that is because the kernel failed, rather than for want of time or memory.
    """

    geometry: str
    query_heads: int
    kv_heads: int
    dim: int
    value_dim: int
    tokens: int
    batch: int
    kind: Kind
    bytes_read: int
    timing: Timing | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    max_error: float | None = None
    bound: float | None = None
    sdpa_backend: str | None = None
    sdpa_ms: float | None = None
    sdpa_ratio: float | None = None
    sdpa_tried: dict[str, float | str] | None = None
    note: str = ""
    failed: bool = False


def random_problem(bench: Bench, shape: Shape, kind: Kind) -> Problem:
    """Return random pages, scattered over the pool in random order, in the bench's arena."""
    bench.arena.reset()
    geometry, pages = shape.geometry, shape.batch * shape.columns
    keys, values = (
        random_pages(bench.arena, kind, geometry.kv_heads, pages, PAGE_SIZE, dim, keys=is_keys)
        for dim, is_keys in ((geometry.dim, True), (geometry.value_dim, False))
    )
    page_table = scattered_table(shape.batch, shape.columns, bench.device)
    query = torch.randn(shape.batch, geometry.query_heads, geometry.dim, device=bench.device, dtype=torch.bfloat16)
    return Problem(query, keys, values, page_table, geometry.dim**-0.5)


def lane_error(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> tuple[float, float]:
    """Return the error of two lanes, the first and the last, and the bound, whichever result comes nearer to it."""
    group = problem.query.shape[1] // problem.keys.heads
    worst = (0.0, 1.0)
    for row, head in ((0, 0), (len(problem.query) - 1, problem.keys.heads - 1)):
        lane = problem.lane(row, head)
        exact, yardstick = (
            attended(*lane.operands(), None, operands, absorbed=lane.absorbed)
            for operands in (torch.float64, problem.query.dtype)
        )
        heads = slice(head * group, (head + 1) * group)
        for result, unit in ((0, 0.0), (1, 1.0)):
            ours = (out, lse)[result][row : row + 1, heads]
            outcome = Outcome("", ours, exact[result], yardstick[result], unit)
            error, bound = max_difference(ours, exact[result]), bound_of(outcome)
            worst = max(worst, (error, bound), key=lambda pair: pair[0] / pair[1])
    return worst


def attention_speeds(
    bench: Bench, cases: Iterable[tuple[Shape, Kind]], red: set[tuple[str, str]], time_limit: TimeLimit
) -> Iterator[AttentionSpeed]:
    """Measure cases in order; cases of one shape that follow one another share the measurement of dense attention.

    Parameters
    ----------
    bench : Bench
        Where and how.
    cases : iterable
        Shapes and kinds.
    red : set
        Failed checks, of :func:`~pikv_hf.eval.gpu.checks.red_operations`: their kinds get no figures.
    time_limit : TimeLimit
        When it is spent, the remaining cases are yielded without figures.
    """
    known: tuple[Shape, DenseSpeed] | None = None
    for shape, kind in cases:
        geometry = dataclasses.asdict(shape.geometry)
        geometry["geometry"] = geometry.pop("name")
        case = AttentionSpeed(
            **geometry, tokens=shape.tokens, batch=shape.batch, kind=kind, bytes_read=shape.read_bytes(kind)
        )
        red_check = why_red(red, OPERATION, kind)
        if note := red_check or obstacle(bench, shape.packed_bytes(kind), time_limit):
            yield dataclasses.replace(case, note=note, failed=bool(red_check))
            continue
        if known is None or known[0] != shape:
            known = shape, dense_speed(bench, shape)
        yield _measured(bench, case, shape, known[1])


def _measured(bench: Bench, case: AttentionSpeed, shape: Shape, dense: DenseSpeed) -> AttentionSpeed:
    try:
        problem = random_problem(bench, shape, case.kind)
        error, bound = lane_error(problem, *problem.run(bench.backend)[:2])
        if not error <= bound:
            return dataclasses.replace(
                case, note=f"red at this size: error {error:.3g}, bound {bound:.3g}", failed=True
            )
        timing = bench.stopwatch(lambda: problem.run(bench.backend))
    except Exception as failure:  # As in a check: whatever a kernel raises, the other cases go on.
        return dataclasses.replace(case, note=reason(failure), failed=True)
    speed = gb_per_s(case.bytes_read, timing)
    dense_ms = None if dense.timing is None else dense.timing.p50_ms
    return dataclasses.replace(
        case,
        timing=timing,
        gb_per_s=speed,
        copy_share=speed / bench.copy_gb_per_s,
        max_error=error,
        bound=bound,
        sdpa_backend=dense.backend,
        sdpa_ms=dense_ms,
        sdpa_ratio=None if dense_ms is None else dense_ms / timing.p50_ms,
        sdpa_tried=dense.tried,
    )
