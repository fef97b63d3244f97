"""Measure latent attention's decode step, beside dense attention to expanded tokens and beside plain matmuls."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from pikv_hf.eval.gpu.arena import fill_random, pages_bytes, random_pages
from pikv_hf.eval.gpu.attention_speed import Problem, lane_error
from pikv_hf.eval.gpu.check_attention import LATENT_OPERATION
from pikv_hf.eval.gpu.checks import reason, why_red
from pikv_hf.eval.gpu.copy_speed import PAGE_SIZE, Bench, gb_per_s, obstacle
from pikv_hf.eval.gpu.dense import DenseSpeed, dense_speed
from pikv_hf.eval.gpu.geometry import Geometry, Shape, scattered_table
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import Timing
from pikv_hf.kernels.page_codes import Kind


@dataclasses.dataclass(frozen=True, slots=True)
class LatentCase:
    """B rows that each decode one token after T cached ones, whose latents are of a kind and rotary keys as they are.

    Attributes
    ----------
    expanded : Geometry
        Of the model, as attention is that expands latents to keys and values of every head.
    rank, rotary : int
        Channels of latents and of rotary keys.
    tokens, batch : int
        T, a multiple of the page size, and B.
    kind : str
        Of the pages of latents.
    """

    expanded: Geometry
    rank: int
    rotary: int
    tokens: int
    batch: int
    kind: Kind

    @property
    def name(self) -> str:
        """Return the kinds of latents and rotary keys, as checks name them."""
        return self.kind if self.kind == "none" else f"{self.kind}/none"

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the pages."""
        pages = self.batch * self.tokens // PAGE_SIZE
        latents = pages_bytes(self.kind, 1, pages, PAGE_SIZE, self.rank, keys=True)
        return latents + pages_bytes("none", 1, pages, PAGE_SIZE, self.rotary, keys=False)

    @property
    def read_bytes(self) -> int:
        """Return the bytes that attention has to read: the pages, table, counts and lengths."""
        return self.packed_bytes + 4 * (2 * self.batch * self.tokens // PAGE_SIZE + self.batch)

    @property
    def operations(self) -> int:
        """Return the multiplications and additions of both products."""
        return 2 * self.batch * self.expanded.query_heads * self.tokens * (2 * self.rank + self.rotary)


DEEPSEEK_V3 = Geometry("DeepSeek-V3", 128, 128, 192, 128), 512, 64
#: Tokens, rows and kinds that are measured, the most important first.
SIZES = ((32768, 8), (32768, 1), (8192, 32))
KINDS: tuple[Kind, ...] = ("none", "int8", "int4")


def latent_cases(*, quick: bool = False) -> Iterator[LatentCase]:
    """Yield what to measure, by importance."""
    for tokens, batch in SIZES[:1] if quick else SIZES:
        for kind in KINDS:
            yield LatentCase(*DEEPSEEK_V3, tokens, batch, kind)


@dataclasses.dataclass(frozen=True, slots=True)
class LatentSpeed:
    """What was measured of a case; figures are None where `note` says why.

    Attributes
    ----------
    geometry, query_heads, rank, rotary, tokens, batch, kind : str or int
        The case; the kind is that of latents and of rotary keys.
    bytes_read : int
        Bytes of all tensors of the pages, of the table, the counts and the lengths.
    timing : Timing or None
        Of the kernel.
    gb_per_s, copy_share, tflops : float or None
        `bytes_read` per second of the median, its share of the copy bandwidth, and 10**12 operations per second.
    max_error, bound : float or None
        Of two lanes of this very case, against float64.
    matmul_ms, matmul_ratio : float or None
        Two matmuls and a softmax over dense bf16 latents and rotary keys, and how many times as long they take as the
        kernel.
    sdpa_backend, sdpa_ms, sdpa_ratio : str, float or None
        Dense attention in bf16 to keys and values of every head, and how many times as long it takes as the kernel.
    note : str
        Why there is no figure.
    failed : bool
        Whether that is because the kernel failed, rather than for want of time or memory.
    """

    geometry: str
    query_heads: int
    rank: int
    rotary: int
    tokens: int
    batch: int
    kind: str
    bytes_read: int
    timing: Timing | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    tflops: float | None = None
    max_error: float | None = None
    bound: float | None = None
    matmul_ms: float | None = None
    matmul_ratio: float | None = None
    sdpa_backend: str | None = None
    sdpa_ms: float | None = None
    sdpa_ratio: float | None = None
    note: str = ""
    failed: bool = False


def random_latents(bench: Bench, case: LatentCase) -> Problem:
    """Return random pages, scattered over the pool in random order, in the bench's arena."""
    bench.arena.reset()
    columns = case.tokens // PAGE_SIZE
    latents = random_pages(bench.arena, case.kind, 1, case.batch * columns, PAGE_SIZE, case.rank, keys=True)
    rotary = random_pages(bench.arena, "none", 1, case.batch * columns, PAGE_SIZE, case.rotary, keys=False)
    page_table = scattered_table(case.batch, columns, bench.device)
    heads, width = case.expanded.query_heads, case.rank + case.rotary
    query = torch.randn(case.batch, heads, width, device=bench.device, dtype=torch.bfloat16)
    return Problem(query, latents, rotary, page_table, width**-0.5, absorbed=True)


def latent_speeds(
    bench: Bench, cases: Iterable[LatentCase], red: set[tuple[str, str]], time_limit: TimeLimit
) -> Iterator[LatentSpeed]:
    """Measure cases in order; see :func:`~pikv_hf.eval.gpu.attention_speed.attention_speeds`."""
    known: tuple[Shape, DenseSpeed, float | None] | None = None
    for case in cases:
        sizes = (case.rank, case.rotary, case.tokens, case.batch)
        speed = LatentSpeed(case.expanded.name, case.expanded.query_heads, *sizes, case.name, case.read_bytes)
        red_check = why_red(red, LATENT_OPERATION, case.kind)
        if note := red_check or obstacle(bench, case.packed_bytes, time_limit):
            yield dataclasses.replace(speed, note=note, failed=bool(red_check))
            continue
        shape = Shape(case.expanded, case.tokens, case.batch)
        if known is None or known[0] != shape:
            known = shape, dense_speed(bench, shape), matmul_ms(bench, case)
        yield _measured(bench, speed, case, *known[1:])


def matmul_ms(bench: Bench, case: LatentCase) -> float | None:
    """Return the median milliseconds of absorbed attention as plain matmuls on dense bf16 tokens, None if it fails."""
    size = 2 * case.batch * case.tokens * (case.rank + case.rotary)
    if bench.too_large(size):
        return None
    bench.arena.reset()
    tokens = bench.arena.take(case.batch, case.tokens, case.rank + case.rotary, dtype=torch.bfloat16)
    fill_random(tokens)
    heads, width = case.expanded.query_heads, case.rank + case.rotary
    query = torch.randn(case.batch, heads, width, device=bench.device, dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        logits = torch.matmul(query * width**-0.5, tokens.transpose(1, 2))
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(torch.bfloat16)
        return torch.matmul(weights, tokens[..., : case.rank])

    try:
        return bench.stopwatch(call).p50_ms
    except RuntimeError:  # Memory for the logits, say.
        return None


def _measured(
    bench: Bench, speed: LatentSpeed, case: LatentCase, dense: DenseSpeed, matmul: float | None
) -> LatentSpeed:
    try:
        problem = random_latents(bench, case)
        error, bound = lane_error(problem, *problem.run(bench.backend)[:2])
        if not error <= bound:
            note = f"red at this size: error {error:.3g}, bound {bound:.3g}"
            return dataclasses.replace(speed, note=note, failed=True)
        timing = bench.stopwatch(lambda: problem.run(bench.backend))
    except Exception as failure:  # As in a check: whatever a kernel raises, the other cases go on.
        return dataclasses.replace(speed, note=reason(failure), failed=True)
    rate = gb_per_s(case.read_bytes, timing)
    dense_ms = None if dense.timing is None else dense.timing.p50_ms
    return dataclasses.replace(
        speed,
        timing=timing,
        gb_per_s=rate,
        copy_share=rate / bench.copy_gb_per_s,
        tflops=case.operations / timing.p50_ms / 1e9,
        max_error=error,
        bound=bound,
        matmul_ms=matmul,
        matmul_ratio=None if matmul is None else matmul / timing.p50_ms,
        sdpa_backend=dense.backend,
        sdpa_ms=dense_ms,
        sdpa_ratio=None if dense_ms is None else dense_ms / timing.p50_ms,
    )
