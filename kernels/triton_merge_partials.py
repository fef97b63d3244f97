# mypy: disallow-untyped-defs=False, check-untyped-defs=False
"""Triton version of :func:`.merge_partials.merge_partials`."""

import torch
import triton
import triton.language as tl

from .triton_basics import row_max, row_sum

# Channels and parts that a program takes at once: rows of 256 bytes, enough programs for a few heads.
BLOCK_D, BLOCK_S = 64, 16


@triton.jit(do_not_specialize=["parts", "rows"])
def _merge_kernel(
    outs, lses, sinks, out, lse, parts, rows,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    # Finite, so that empty parts weigh exp(-inf - peak) = 0 and not NaN.
    peak = row_max(tl.full((BLOCK_S,), -1.0e38, tl.float32), 0)
    total = row_sum(tl.full((BLOCK_S,), 0.0, tl.float32), 0)
    mixed = tl.full((BLOCK_D,), 0.0, tl.float32)
    for first in tl.range(0, parts, BLOCK_S):
        index = (first + s).to(tl.int64) * rows + row
        logs = tl.load(lses + index, mask=first + s < parts, other=float("-inf"))
        numbers = tl.load(
            outs + index[:, None] * D + d[None, :],
            mask=(logs > float("-inf"))[:, None] & (d < D)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, row_max(logs, 0))
        weights = tl.exp(logs - new_peak)
        decay = tl.exp(peak - new_peak)
        total = total * decay + row_sum(weights, 0)
        mixed = mixed * decay + row_sum(numbers * weights[:, None], 0)
        peak = new_peak
    whole = tl.where(total > 0.0, peak + tl.log(tl.maximum(total, 1.0e-37)), float("-inf"))
    if SINKS:
        sink = tl.load(sinks + row % HEADS).to(tl.float32)
        above = tl.maximum(peak, sink)
        mixed = mixed * tl.exp(peak - above)
        total = total * tl.exp(peak - above) + tl.exp(sink - above)
    # All parts empty and no sink: 0 / 1e-37.
    tl.store(out + row * D + d, mixed / tl.maximum(total, 1.0e-37), mask=d < D)
    tl.store(lse + row, whole)


def merge_partials(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `(S, B, Hq, Dv)`; see the public function."""
    parts, batch, heads, dim = outs.shape
    out = outs.new_empty((batch, heads, dim))
    lse = lses.new_empty((batch, heads))
    if batch * heads:
        _merge_kernel[(batch * heads, triton.cdiv(dim, BLOCK_D))](
            outs.contiguous(), lses.contiguous(), sinks, out, lse, parts, batch * heads,
            HEADS=heads, D=dim, BLOCK_D=BLOCK_D, BLOCK_S=BLOCK_S, SINKS=sinks is not None,
        )  # fmt: skip
    return out, lse
