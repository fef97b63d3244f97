"""Check attention to lists of pages of several pools, in formats of their own, against float64."""

import functools
from collections.abc import Iterator, Sequence

import torch

from pikv_hf.eval.gpu.checks import Outcome, PlannedCheck, Platform
from pikv_hf.eval.gpu.page_lists import TablePool, all_at_once
from pikv_hf.eval.gpu.pools import encoded_pool, ragged_table
from pikv_hf.eval.gpu.references import attended, merged
from pikv_hf.kernels.page_codes import Kind

OPERATION = "page_lists"

#: Kinds of the pools of a cache whose pages have several widths: two are stored as they are.
WIDTHS: tuple[Kind, ...] = ("none", "int8", "int4", "none", "int2")

BATCH, KV_HEADS, GROUP, DIM, COLUMNS, PAGE_SIZE = 5, 2, 8, 128, 7, 32


def list_outcomes(
    kinds: Sequence[Kind],
    dtype: torch.dtype,
    platform: Platform,
    *,
    dim: int = DIM,
    page_size: int = PAGE_SIZE,
    softcap: float | None = None,
) -> Iterator[Outcome]:
    """Attend with ragged rows to pools of these kinds, and yield `out` and `lse`."""
    generator = torch.Generator().manual_seed(7)
    pools = []
    for kind in kinds:
        page_table = ragged_table(BATCH, COLUMNS, page_size, generator)
        form = functools.partial(encoded_pool, kind, KV_HEADS, dim, page_size, page_table, dtype, generator)
        pools.append(TablePool(form(keys=True), form(keys=False), page_table))
    query = torch.randn(BATCH, KV_HEADS * GROUP, dim, generator=generator).to(dtype)
    scale = 0.9 * dim**-0.5

    def expected(operands: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [attended(query, pool.keys, pool.values, pool.page_table, scale, softcap, operands) for pool in pools]
        outs, lses = (torch.stack([part[result] for part in parts]) for result in (0, 1))
        return merged(outs, lses, None, torch.float64)

    there = [pool.to(platform.device) for pool in pools]
    out, lse = all_at_once(there, platform.backend)(query.to(platform.device), scale, softcap)
    exact, yardstick = expected(torch.float64), expected(dtype)
    yield Outcome("out", out, exact[0], yardstick[0])
    yield Outcome("lse", lse, exact[1], yardstick[1], unit=1.0)


def list_plans(*, quick: bool = False) -> list[PlannedCheck]:
    """Return the checks to run on a GPU."""

    def plan(case: str, kinds: Sequence[Kind], dtype: torch.dtype, softcap: float | None = None) -> PlannedCheck:
        run = functools.partial(list_outcomes, kinds, dtype, softcap=softcap)
        return PlannedCheck(OPERATION, case, dtype, "/".join(dict.fromkeys(kinds)), run)

    plans = [plan("all widths", WIDTHS, torch.bfloat16)]
    if not quick:
        plans += [plan("all widths", WIDTHS, torch.float16), plan("softcap", ("none", "fp8"), torch.bfloat16, 5.0)]
    return plans
