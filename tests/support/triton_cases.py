"""Random pools of packed pages whose unused memory is poisoned, and a slow reference in float64."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from pikv_hf.kernels import paged_decode_attention
from pikv_hf.kernels.bit_packing import pack, unpack
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import BITS, Kind, PageCodes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKEND = "triton" if GPU else "interpret"

#: Page numbers that no pool has, where a table is not in use.
NOWHERE = (10**8, -7)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a decode step."""

    query: torch.Tensor
    keys: PageCodes
    values: PageCodes
    table: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def poisoned(
    heads: int,
    size: int,
    dim: int,
    kind: Kind,
    counts: torch.Tensor,
    dtype: torch.dtype,
    *,
    keys: bool,
    latent: int = 0,
    factor: float = 1.0,
) -> PageCodes:
    """Return pages of random tokens, NaN or the largest code in all slots that hold none."""
    pages = len(counts)
    spread = torch.exp(torch.randn(heads, pages, 1, dim))
    tokens = torch.randn(heads, pages, size, dim) * spread + torch.randn(heads, pages, 1, dim)
    encoded = encode_pages((tokens * factor).to(dtype), kind, keys=keys, backend="torch")
    empty = torch.arange(size) >= counts[:, None]
    unused = counts == 0

    def spoil(tensor: torch.Tensor | None, value: float) -> torch.Tensor | None:
        if tensor is None:
            return None
        return tensor.masked_fill(unused.view(1, -1, *[1] * (tensor.dim() - 2)), value)

    if kind in BITS:
        numbers = unpack(encoded.codes, BITS[kind], size).masked_fill(empty[..., None], encoded.levels)
        codes = pack(numbers, BITS[kind])
    else:
        codes = encoded.codes.masked_fill(empty[..., None], math.nan if kind == "none" else 255)
    rest = torch.randn(heads, pages, size, latent).to(dtype).masked_fill(empty[..., None], math.nan) if latent else None
    floor = spoil(encoded.floor, math.nan if keys else 127)
    spoiled = (spoil(encoded.spread, 255), floor, spoil(encoded.outliers, dim - 1), spoil(encoded.fine, 255))
    return PageCodes(kind, size, codes, *spoiled, rest).map(lambda tensor: tensor.to(DEVICE))


def random_case(
    kinds: tuple[Kind, Kind] = ("int4", "int4"),
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    groups: int = 4,
    size: int = 16,
    dims: tuple[int, int] = (32, 32),
    latents: tuple[int, int] = (0, 0),
    lengths: Sequence[int] = (3, 0, 2),
    counts: Sequence[int] | None = None,
    seed: int = 0,
    factor: float = 1.0,
    absorbed: bool = False,
    device: torch.device = DEVICE,
) -> Case:
    """Return a decode step over a pool of poisoned pages, some of them partly filled and one empty.

    Keys are multiplied by `factor`, and queries divided by it. Keys are latents and values rotary keys if `absorbed`.
    """
    torch.manual_seed(seed)
    if counts is None:
        counts = [size, max(1, size - 1), 0, size, 1, size]
    held = torch.tensor(counts, dtype=torch.int32)
    pools = [
        poisoned(heads, size, dim, kind, held, dtype, keys=keys, latent=latent, factor=factor if keys else 1.0)
        for keys, kind, dim, latent in zip((True, False), kinds, dims, latents, strict=True)
    ]
    columns = max([*lengths, 1]) + 1
    table = torch.tensor(NOWHERE, dtype=torch.int32).repeat(len(lengths), columns)[:, :columns].contiguous()
    for row, length in enumerate(lengths):
        table[row, :length] = torch.randperm(len(counts))[:length].int()
    width = dims[0] + latents[0] + (dims[1] + latents[1] if absorbed else 0)
    query = (torch.randn(len(lengths), heads * groups, width) / factor).to(dtype)
    return Case(
        query.to(device),
        *(pages.map(lambda tensor: tensor.to(device)) for pages in pools),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        held.to(device),
        width**-0.5,
    )


def naive_attention(
    case: Case, softcap: float | None = None, *, absorbed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend token by token: `out`, `lse` and the LSE of each page, float64 on the CPU."""
    keys, values = (decode_pages(pages, torch.float32).double().cpu() for pages in (case.keys, case.values))
    if absorbed:
        keys, values = torch.cat([keys, values], dim=-1), keys
    query, table, counts = case.query.double().cpu(), case.table.tolist(), case.counts.tolist()
    batch, query_heads, _ = query.shape
    groups = query_heads // keys.shape[0]
    out = torch.zeros(batch, query_heads, values.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, query_heads), -math.inf, dtype=torch.float64)
    page_lse = torch.full((batch, query_heads, case.table.shape[1]), -math.inf, dtype=torch.float64)
    for row, length in enumerate(case.lengths.tolist()):
        for head in range(query_heads):
            logits, seen = [], []
            for column in range(length):
                page = table[row][column]
                of_page = []
                for slot in range(counts[page]):
                    logit = float(keys[head // groups, page, slot] @ query[row, head]) * case.scale
                    of_page.append(logit if softcap is None else softcap * math.tanh(logit / softcap))
                    seen.append(values[head // groups, page, slot])
                if of_page:
                    page_lse[row, head, column] = torch.logsumexp(torch.tensor(of_page, dtype=torch.float64), 0)
                logits += of_page
            if logits:
                weights = torch.tensor(logits, dtype=torch.float64)
                lse[row, head] = torch.logsumexp(weights, 0)
                out[row, head] = torch.softmax(weights, 0) @ torch.stack(seen)
    return out, lse, page_lse


def assert_as_exact(
    actual: Sequence[torch.Tensor], yardstick: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """Check that errors are at most twice those of the same computation in torch in the same dtype.

    Twice as a root mean square; the largest of few numbers depends on chance, and may be four times as large. Torch may
    be exact by chance, so that eight float32 roundings are allowed in any case: of a logit, the largest of which is
    about the largest of the last results (LSEs), and which moves the output by as much times a value.
    """
    logs = exact[-1][exact[-1].isfinite()].abs()
    logit = 1 + (logs.max() if logs.numel() else 0.0)
    for ours, theirs, truth in zip(actual, yardstick, exact, strict=True):
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        finite = truth.isfinite()
        assert torch.equal(ours[~finite], truth[~finite])
        assert ours[finite].isfinite().all()
        if finite.any():
            floor = 8 * 2.0**-24 * logit * (1 + truth[finite].abs().max())
            errors = [x[finite].sub(truth[finite]).abs() for x in (ours, theirs)]
            for limit, (error, allowed) in {
                2: (error.square().mean().sqrt() for error in errors),
                4: (error.max() for error in errors),
            }.items():
                assert error <= limit * allowed + floor, f"error {error:.3g}, torch's {allowed:.3g}"


def check(
    case: Case,
    softcap: float | None = None,
    tuning: dict[str, int] | None = None,
    *,
    absorbed: bool = False,
    backend: str = BACKEND,
) -> None:
    """Compare the three results of a compiled version, and those of the torch version, with a float64 reference."""
    arguments = (*case.arguments(), softcap)
    actual = paged_decode_attention(*arguments, page_lse=True, absorbed=absorbed, backend=backend, tuning=tuning)
    yardstick = paged_decode_attention(*arguments, page_lse=True, absorbed=absorbed, backend="torch")
    exact = naive_attention(case, softcap, absorbed=absorbed)
    if absorbed:
        # Without the LSEs of pages a tile may be of several of them.
        plain = paged_decode_attention(*arguments, absorbed=True, backend=backend, tuning=tuning)
        assert_as_exact(plain, yardstick[:2], exact[:2])
    assert all(result.dtype == torch.float32 and result.device == case.query.device for result in actual)
    assert_as_exact(actual, yardstick, exact)
    # The torch version, too, is only a computation in that dtype: with half the digits, half the digits right.
    for theirs, truth in zip(yardstick, exact, strict=True):
        finite = truth.isfinite()
        assert torch.equal(theirs.cpu().isfinite(), finite)
        scale = 1 + truth[finite].abs().max() if finite.any() else 1.0
        close = (theirs.double().cpu() - truth)[finite].abs() <= 64 * torch.finfo(case.query.dtype).eps * scale
        assert close.all()
