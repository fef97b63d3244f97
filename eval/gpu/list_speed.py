"""Time a whole step of a layer, writing a token and attending to lists of pages, beside DynamicCache's."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from pikv_hf.eval.gpu.arena import fill_random, random_pages
from pikv_hf.eval.gpu.check_lists import OPERATION
from pikv_hf.eval.gpu.checks import max_difference, reason, why_red
from pikv_hf.eval.gpu.copy_speed import PAGE_SIZE, Bench, gb_per_s, obstacle
from pikv_hf.eval.gpu.dense import dense_speed
from pikv_hf.eval.gpu.geometry import GEOMETRIES, Shape, scattered_table
from pikv_hf.eval.gpu.page_lists import TablePool, all_at_once, one_by_one
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels import append_newest
from pikv_hf.kernels.page_codes import Kind

#: Pools of equal numbers of pages: an exact cache, one of int4 pages, and one of all widths.
MIXES: tuple[tuple[Kind, ...], ...] = (("none",), ("none", "int4", "int4", "int4"), ("none", "int8", "int4", "int2"))

#: What all at once may differ from one by one, as a share of the largest: some roundings of weights to bf16.
ALLOWED = 2.0**-6


@dataclasses.dataclass(frozen=True, slots=True)
class ListSpeed:
    """What was measured of a step; figures are None where `note` says why.

    Attributes
    ----------
    geometry, tokens, batch, kind : str or int
        The case, `kind` having those of the pools.
    bytes_read : int
        Bytes of the pages.
    timing : Timing or None
        Of writing a token of each row and attending.
    gb_per_s, copy_share : float or None
        `bytes_read` per second of the median, and its share of the copy bandwidth.
    max_error, bound : float or None
        Against the pools read one by one.
    sdpa_ms, sdpa_ratio : float or None
        Dense attention in bf16 alone, and how many times as long it takes.
    dynamic_ms, dynamic_ratio : float or None
        DynamicCache's step: keys and values concatenated with the new token, and dense attention.
    note : str
        Why there is no figure.
    failed : bool
        Whether that is because the kernel failed, rather than for want of time or memory.
    """

    geometry: str
    tokens: int
    batch: int
    kind: str
    bytes_read: int
    timing: Timing | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    max_error: float | None = None
    bound: float | None = None
    sdpa_ms: float | None = None
    sdpa_ratio: float | None = None
    dynamic_ms: float | None = None
    dynamic_ratio: float | None = None
    note: str = ""
    failed: bool = False


def list_cases(*, quick: bool = False) -> Iterator[tuple[Shape, tuple[Kind, ...]]]:
    """Yield what to measure, by importance."""
    for tokens in (32768,) if quick else (32768, 131072):
        for mix in MIXES:
            yield Shape(GEOMETRIES[0], tokens, 8), mix


def list_speeds(
    bench: Bench,
    cases: Iterable[tuple[Shape, tuple[Kind, ...]]],
    red: set[tuple[str, str]],
    time_limit: TimeLimit,
) -> Iterator[ListSpeed]:
    """Measure cases in order; see :func:`~pikv_hf.eval.gpu.attention_speed.attention_speeds`."""
    known: tuple[Shape, float | None, float | None] | None = None
    for shape, mix in cases:
        size = sum(_part(shape, mix).packed_bytes(kind) for kind in mix)
        kind = "/".join(dict.fromkeys(mix))
        case = ListSpeed(shape.geometry.name, shape.tokens, shape.batch, kind, size)
        red_check = next(filter(None, (why_red(red, OPERATION, each) for each in mix)), "")
        if note := red_check or obstacle(bench, max(size, shape.dense_bytes), time_limit):
            yield dataclasses.replace(case, note=note, failed=bool(red_check))
            continue
        try:
            if known is None or known[0] != shape:
                dense = dense_speed(bench, shape).timing
                known = shape, None if dense is None else dense.p50_ms, _dynamic_ms(bench, shape)
            yield _measured(bench, case, shape, mix, known[1], known[2])
        except Exception as failure:  # As in a check: whatever a kernel raises, the other cases go on.
            yield dataclasses.replace(case, note=reason(failure), failed=True)


def _part(shape: Shape, mix: Sequence[Kind]) -> Shape:
    """Return the share of a shape's tokens that one of the pools has."""
    return dataclasses.replace(shape, tokens=shape.tokens // len(mix))


def _measured(
    bench: Bench, case: ListSpeed, shape: Shape, mix: Sequence[Kind], sdpa: float | None, dynamic: float | None
) -> ListSpeed:
    bench.arena.reset()
    pools = [_random_pool(bench, _part(shape, mix), kind) for kind in mix]
    geometry, scale = shape.geometry, shape.geometry.dim**-0.5
    query = torch.randn(shape.batch, geometry.query_heads, geometry.dim, device=bench.device, dtype=torch.bfloat16)
    attend, write = all_at_once(pools, bench.backend), _writer(bench, pools[0], shape)

    def step() -> torch.Tensor:
        write()
        return attend(query, scale)[0]

    out, (expected, _) = step(), one_by_one(pools, query, scale, None, bench.backend)
    error, bound = max_difference(out, expected), ALLOWED * float(expected.abs().max())
    if not error <= bound:
        return dataclasses.replace(case, note=f"red at this size: error {error:.3g}, bound {bound:.3g}", failed=True)
    timing = bench.stopwatch(step)
    speed = gb_per_s(case.bytes_read, timing)
    return dataclasses.replace(
        case,
        timing=timing,
        gb_per_s=speed,
        copy_share=speed / bench.copy_gb_per_s,
        max_error=error,
        bound=bound,
        sdpa_ms=sdpa,
        sdpa_ratio=None if sdpa is None else sdpa / timing.p50_ms,
        dynamic_ms=dynamic,
        dynamic_ratio=None if dynamic is None else dynamic / timing.p50_ms,
    )


def _random_pool(bench: Bench, shape: Shape, kind: Kind) -> TablePool:
    geometry, pages = shape.geometry, shape.batch * shape.columns
    keys, values = (
        random_pages(bench.arena, kind, geometry.kv_heads, pages, PAGE_SIZE, dim, keys=is_keys)
        for dim, is_keys in ((geometry.dim, True), (geometry.value_dim, False))
    )
    return TablePool(keys, values, scattered_table(shape.batch, shape.columns, bench.device))


def _writer(bench: Bench, pool: TablePool, shape: Shape) -> Callable[[], None]:
    """Return what writes a token of each row into its last page."""
    slots = pool.page_table.entries[:, -1].long() * PAGE_SIZE
    keys, values = _new_tokens(bench, shape)
    positions = torch.zeros((pool.keys.pages, PAGE_SIZE), dtype=torch.int32, device=bench.device)
    pages = pool.keys.codes, pool.values.codes, positions
    return lambda: append_newest(*pages, slots, PAGE_SIZE - 1, keys, values, shape.tokens, backend=bench.backend)


def _new_tokens(bench: Bench, shape: Shape) -> list[torch.Tensor]:
    rows, geometry = (shape.batch, shape.geometry.kv_heads, 1), shape.geometry
    dims = geometry.dim, geometry.value_dim
    return [torch.randn(*rows, dim, device=bench.device, dtype=torch.bfloat16) for dim in dims]


def _dynamic_ms(bench: Bench, shape: Shape) -> float | None:
    """Return the median milliseconds of DynamicCache's step, None where its copies find no memory."""
    bench.arena.reset()
    geometry, rows = shape.geometry, (shape.batch, shape.geometry.kv_heads, shape.tokens)
    stored = [
        fill_random(bench.arena.take(*rows, dim, dtype=torch.bfloat16)) for dim in (geometry.dim, geometry.value_dim)
    ]
    new = _new_tokens(bench, shape)
    query = torch.randn(shape.batch, geometry.query_heads, 1, geometry.dim, device=bench.device, dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(stored, new, strict=True))
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    try:
        return bench.stopwatch(step).p50_ms
    except torch.OutOfMemoryError:
        return None
