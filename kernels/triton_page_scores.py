# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.page_scores.page_scores`."""

import torch
import triton
import triton.language as tl

from .triton_basics import row_max, spread_share
from .triton_pool import MIN_HEADS

# Pages that a program takes at once.
BLOCK_N = 32


@triton.jit(do_not_specialize=["columns", "low_pages", "high_pages"])
def _scores_kernel(
    query, low, high, table, lengths, scores, columns, low_pages, high_pages,
    HEADS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LOW_ROW: tl.constexpr, HIGH_ROW: tl.constexpr, BLOCK_N: tl.constexpr, CENTROID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = (columns + BLOCK_N - 1) // BLOCK_N
    lane = tl.program_id(0) // blocks
    row = (lane // HEADS).to(tl.int64)
    head = (lane % HEADS).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    used = n < tl.load(lengths + row)
    page = tl.load(table + row * columns + n, mask=used, other=0).to(tl.int64)
    mask = used[:, None] & (d < D)[None, :]
    rows = lane.to(tl.int64) * G + g
    q = tl.load(query + rows[None, :] * D + d[:, None], mask=(g < G)[None, :] & (d < D)[:, None], other=0.0)
    q = q.to(tl.float32)
    least = tl.load(low + (head * low_pages + page)[:, None] * LOW_ROW + d[None, :], mask=mask, other=0.0)
    least = least.to(tl.float32)
    if CENTROID:
        products = tl.dot(least, q, input_precision=PRECISION)
    else:
        # max(q l, q h) is q l + max(q, 0) (h - l).
        spread = tl.load(high + (head * high_pages + page)[:, None] * HIGH_ROW + d[None, :], mask=mask, other=0)
        if high.dtype.element_ty == tl.uint8:
            spread = spread_share(spread.to(tl.int32), 0.0, False)
        else:
            spread = spread.to(tl.float32) - least
        products = tl.dot(least, q, input_precision=PRECISION)
        products = tl.dot(spread, tl.maximum(q, 0.0), products, input_precision=PRECISION)
    products = tl.where((g < G)[None, :], products, float("-inf"))
    best = tl.where(used, row_max(products, 1), float("-inf"))
    tl.store(scores + lane.to(tl.int64) * columns + n, best, mask=n < columns)


def page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Launch the kernel; see the public function."""
    heads, _, dim = low.shape
    batch, query_heads, _ = query.shape
    columns = table.shape[1]
    scores = query.new_empty((batch, heads, columns), dtype=torch.float32)
    low_row, low_pages = _layout(low)
    high_row, high_pages = (0, 0) if high is None else _layout(high)
    if scores.numel():
        _scores_kernel[(triton.cdiv(columns, BLOCK_N) * batch * heads,)](
            query.contiguous(), low, high, table.contiguous(), lengths.contiguous(), scores,
            columns, low_pages, high_pages,
            HEADS=heads, G=query_heads // heads, BLOCK_G=max(MIN_HEADS, triton.next_power_of_2(query_heads // heads)),
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), LOW_ROW=low_row, HIGH_ROW=high_row, BLOCK_N=BLOCK_N,
            CENTROID=high is None,
            # Three products of tensor cores are as exact as one of float32, where operands had 16 bits to begin with.
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32x3",
        )  # fmt: skip
    return scores


def _layout(summary: torch.Tensor) -> tuple[int, int]:
    """Return how far apart pages are, and heads in pages: least and largest values may lie beside each other."""
    heads, row, channel = summary.stride()
    if channel != 1 or row < summary.shape[2] or heads % row:
        raise ValueError(f"a summary of shape {tuple(summary.shape)} has strides {summary.stride()}: not one of pages")
    return row, heads // row
