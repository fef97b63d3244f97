"""Check the operations on pages against float64: gather, encode, score, merge, append."""

import functools
from collections.abc import Iterator

import torch

from pikv_hf.eval.gpu.checks import Outcome, PlannedCheck, Platform
from pikv_hf.eval.gpu.pools import encoded_pool, ragged_table, random_tokens
from pikv_hf.eval.gpu.references import gathered, merged, scored
from pikv_hf.kernels import append_newest, append_tokens, gather_pages, merge_partials, page_scores
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import KINDS, Kind, PageCodes

#: KV heads, query heads per KV head and channels of the checks' pages.
HEADS, GROUP, DIM = 2, 4, 128
#: How page_scores is told the greatest values of a page.
BOUNDS = ("spread codes", "greatest values", "centroids")


def gather_outcomes(
    kind: Kind,
    dtype: torch.dtype,
    platform: Platform,
    *,
    keys: bool,
    rank: int = 0,
    dim: int = DIM,
    page_size: int = 32,
) -> Iterator[Outcome]:
    """Gather and decode ragged rows."""
    generator = torch.Generator().manual_seed(11)
    page_table = ragged_table(4, 5, page_size, generator)
    pages = encoded_pool(kind, HEADS, dim, page_size, page_table, dtype, generator, keys=keys, rank=rank)
    there = page_table.to(platform.device)
    result = gather_pages(
        _on(pages, platform), there.entries, there.lengths, there.counts, dtype, backend=platform.backend
    )
    yield Outcome("pages", result, gathered(pages, page_table, torch.float64), gathered(pages, page_table, dtype))


def encode_outcomes(
    kind: Kind,
    dtype: torch.dtype,
    platform: Platform,
    *,
    keys: bool,
    pages: int = 24,
    dim: int = DIM,
    page_size: int = 32,
) -> Iterator[Outcome]:
    """Encode pages; what they decode to is compared with the tokens, by the error of torch's own encoding."""
    generator = torch.Generator().manual_seed(13)
    tokens = random_tokens(HEADS, pages, page_size, dim, generator, keys=keys).to(dtype)
    encoded = encode_pages(tokens.to(platform.device), kind, keys=keys, backend=platform.backend)
    torchs = encode_pages(tokens, kind, keys=keys, backend="torch")
    _require_one_format(encoded, torchs)
    ours, theirs = (decode_pages(codes.map(torch.Tensor.cpu), torch.float32).double() for codes in (encoded, torchs))
    exact = tokens.double()
    yield Outcome("decoded", ours, exact, theirs)
    # Single codes that round the other way, or another choice among channels equally wide, hardly change the mean.
    yield Outcome("root mean square", _rms(ours - exact), torch.zeros(()), _rms(theirs - exact), factor=1.02)


def _rms(errors: torch.Tensor) -> torch.Tensor:
    return errors.square().mean().sqrt()


def _require_one_format(encoded: PageCodes, torchs: PageCodes) -> None:
    formats = [[(tuple(part.shape), part.dtype) for part in codes.tensors()] for codes in (encoded, torchs)]
    if formats[0] != formats[1]:
        raise ValueError(f"encoded pages are {formats[0]}, torch's {formats[1]}")
    if encoded.outliers is not None:
        channels = encoded.outliers.sort(dim=-1).values
        if (channels[..., 1:] == channels[..., :-1]).any():
            raise ValueError("an outlier channel is named twice in a page")


def score_outcomes(bounds: str, dtype: torch.dtype, platform: Platform, *, dim: int = DIM) -> Iterator[Outcome]:
    """Score the pages of ragged rows."""
    generator = torch.Generator().manual_seed(17)
    page_table = ragged_table(4, 6, 32, generator)
    pages = page_table.counts.shape[0]
    query = torch.randn(4, HEADS * GROUP, dim, generator=generator).to(dtype)
    low = torch.randn(HEADS, pages, dim, generator=generator)
    high: torch.Tensor | None = None
    if bounds == "spread codes":
        low, high = low.half(), torch.randint(90, 150, low.shape, generator=generator, dtype=torch.uint8)
    elif bounds == "greatest values":
        low, high = low.to(dtype), (low + torch.rand(low.shape, generator=generator)).to(dtype)
    there = page_table.to(platform.device)
    result = page_scores(
        query.to(platform.device),
        low.to(platform.device),
        None if high is None else high.to(platform.device),
        there.entries,
        there.lengths,
        backend=platform.backend,
    )
    expected = functools.partial(scored, query, low, high, page_table)
    yield Outcome("scores", result, expected(torch.float64), expected(dtype))


def merge_outcomes(parts: int, platform: Platform, *, sinks: bool, dim: int = DIM) -> Iterator[Outcome]:
    """Merge parts, some of them empty, and a row of which all are."""
    generator = torch.Generator().manual_seed(19)
    outs = torch.randn(parts, 3, 8, dim, generator=generator)
    lses = torch.randn(parts, 3, 8, generator=generator) * 3
    lses[torch.rand(lses.shape, generator=generator) < 0.3] = -torch.inf
    lses[:, 1] = -torch.inf
    sink = torch.randn(8, generator=generator) if sinks else None
    result = merge_partials(
        outs.to(platform.device),
        lses.to(platform.device),
        None if sink is None else sink.to(platform.device),
        backend=platform.backend,
    )
    exact, yardstick = (merged(outs, lses, sink, operands) for operands in (torch.float64, torch.float32))
    yield Outcome("out", result[0], exact[0], yardstick[0])
    yield Outcome("lse", result[1], exact[1], yardstick[1], unit=1.0)


def append_outcomes(dtype: torch.dtype, platform: Platform, *, dim: int = DIM) -> Iterator[Outcome]:
    """Write tokens, a strided view, into slots of a pool whose other slots must stay as they are."""
    generator = torch.Generator().manual_seed(23)
    pool = torch.randn(HEADS, 6, 32, dim, generator=generator).to(dtype)
    slots = torch.randperm(6 * 32, generator=generator)[:50]
    tokens = torch.randn(50, HEADS, dim, generator=generator).to(dtype).transpose(0, 1)
    expected = pool.clone()
    expected.flatten(1, 2)[:, slots] = tokens
    there = pool.to(platform.device, copy=True)
    append_tokens(there, slots.to(platform.device), tokens.to(platform.device), backend=platform.backend)
    yield Outcome("pool", there, expected, expected, floor=0.0)


def newest_outcomes(dtype: torch.dtype, platform: Platform, *, dim: int = DIM) -> Iterator[Outcome]:
    """Write one token per row, strided views, with its position, behind slots known before."""
    generator = torch.Generator().manual_seed(29)
    keys_of, values_of = (torch.randn(HEADS, 6, 32, dim, generator=generator).to(dtype) for _ in range(2))
    positions = torch.full((6, 32), -1, dtype=torch.int32)
    slots, offset, position = torch.tensor([3 * 32 + 1, 7, 5 * 32]), 5, 1234
    keys, values = (torch.randn(3, 1, HEADS, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    there = [each.to(platform.device, copy=True) for each in (keys_of, values_of, positions)]
    new = keys.to(platform.device), values.to(platform.device)
    places = slots.to(platform.device), offset
    append_newest(there[0], there[1], there[2], *places, *new, position, backend=platform.backend)
    for pages, tokens in ((keys_of, keys), (values_of, values)):
        pages.flatten(1, 2)[:, slots + offset] = tokens[:, :, 0].transpose(0, 1)
    positions.view(-1)[slots + offset] = position
    written = {"keys": keys_of, "values": values_of, "positions": positions}
    for (name, expected), result in zip(written.items(), there, strict=True):
        yield Outcome(name, result, expected, expected, floor=0.0)


def _on(pages: PageCodes, platform: Platform) -> PageCodes:
    return pages.map(lambda tensor: tensor.to(platform.device))


def gather_plans(dtype: torch.dtype) -> Iterator[PlannedCheck]:
    """Return the checks of gathering in a dtype."""
    for kind in KINDS:
        # Every further check is another kernel to compile: latent channels are the same in any dtype.
        latent = (("latent keys", True, 24),) if dtype == torch.bfloat16 else ()
        for name, keys, rank in (("keys", True, 0), ("values", False, 0), *latent):
            run = functools.partial(gather_outcomes, kind, dtype, keys=keys, rank=rank)
            yield PlannedCheck("gather_pages", name, dtype, kind, run)


def encode_plans(dtype: torch.dtype) -> Iterator[PlannedCheck]:
    """Return the checks of encoding tokens of a dtype."""
    for kind in KINDS[1:]:
        for name, keys in (("keys", True), ("values", False)):
            yield PlannedCheck(
                "encode_pages", name, dtype, kind, functools.partial(encode_outcomes, kind, dtype, keys=keys)
            )


def small_plans(dtype: torch.dtype) -> Iterator[PlannedCheck]:
    """Return the checks of scoring pages and appending tokens in a dtype."""
    for bounds in BOUNDS:
        yield PlannedCheck("page_scores", bounds, dtype, "-", functools.partial(score_outcomes, bounds, dtype))
    yield PlannedCheck("append_tokens", "strided tokens", dtype, "-", functools.partial(append_outcomes, dtype))
    yield PlannedCheck("append_newest", "strided tokens", dtype, "-", functools.partial(newest_outcomes, dtype))


def merge_plans() -> Iterator[PlannedCheck]:
    """Return the checks of merging, which is in float32."""
    for parts, sinks in ((1, False), (2, True), (7, False), (7, True)):
        name = f"{parts} parts{', sinks' if sinks else ''}"
        run = functools.partial(merge_outcomes, parts, sinks=sinks)
        yield PlannedCheck("merge_partials", name, torch.float32, "-", run)


def page_plans(*, quick: bool = False) -> list[PlannedCheck]:
    """Return the checks to run on a GPU."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    plans: list[PlannedCheck] = [*merge_plans()]
    for dtype in dtypes:
        plans += [*small_plans(dtype), *gather_plans(dtype), *encode_plans(dtype)]
    return plans
