"""Check `paged_decode_attention` against attention in float64, on pages of every kind, of latents too."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import torch

from pikv_hf.eval.gpu.checks import Outcome, PlannedCheck, Platform
from pikv_hf.eval.gpu.pools import encoded_pool, ragged_table
from pikv_hf.eval.gpu.references import attended
from pikv_hf.kernels import paged_decode_attention
from pikv_hf.kernels.page_codes import KINDS, Kind

OPERATION = "paged_decode_attention"
#: The same over latents, which has a kernel of its own.
LATENT_OPERATION = "absorbed_decode_attention"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionCase:
    """Sizes of a check.

    Attributes
    ----------
    keys, values : str
        Kinds of the pages.
    dtype : torch.dtype
        Of the query, of pages of kind `"none"` and of latent channels.
    kv_heads, group, dim, value_dim : int
        H, G, D and Dv.
    batch, columns, page_size : int
        B, n and P.
    key_rank, value_rank : int
        Latent channels L and Lv.
    softcap : float or None
        As the kernel takes it.
    page_lse : bool
        Whether the log-sum-exp of each page is asked for and checked.
    full : bool
        Whether every row has all columns, instead of rows of different lengths.
    absorbed : bool
        Whether keys are latents and values their rotary keys.
    """

    keys: Kind = "none"
    values: Kind = "none"
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    group: int = 4
    dim: int = 128
    value_dim: int = 128
    batch: int = 5
    columns: int = 7
    page_size: int = 32
    key_rank: int = 0
    value_rank: int = 0
    softcap: float | None = None
    page_lse: bool = False
    full: bool = False
    absorbed: bool = False

    @property
    def kind(self) -> str:
        """Return the kind of the pages, or both with a slash."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"


def attention_outcomes(case: AttentionCase, platform: Platform) -> Iterator[Outcome]:
    """Run the kernel on a case and yield `out`, `lse` and, if asked for, `page_lse`."""
    generator = torch.Generator().manual_seed(7)
    page_table = ragged_table(case.batch, case.columns, case.page_size, generator, full=case.full)
    pool = functools.partial(
        encoded_pool, page_size=case.page_size, page_table=page_table, dtype=case.dtype, generator=generator
    )
    keys = pool(case.keys, case.kv_heads, case.dim, keys=True, rank=case.key_rank)
    values = pool(case.values, case.kv_heads, case.value_dim, keys=False, rank=case.value_rank)
    width = keys.width + (values.width if case.absorbed else 0)
    query = torch.randn(case.batch, case.kv_heads * case.group, width, generator=generator).to(case.dtype)
    # No power of two, by which nothing would be rounded.
    scale = 0.9 * width**-0.5
    operands = (query, keys, values, page_table, scale, case.softcap)
    expected = functools.partial(attended, *operands, absorbed=case.absorbed)
    exact, yardstick = expected(torch.float64), expected(case.dtype)
    there = page_table.to(platform.device)
    result = paged_decode_attention(
        query.to(platform.device),
        keys.map(lambda tensor: tensor.to(platform.device)),
        values.map(lambda tensor: tensor.to(platform.device)),
        there.entries,
        there.lengths,
        there.counts,
        scale,
        case.softcap,
        page_lse=case.page_lse,
        absorbed=case.absorbed,
        backend=platform.backend,
    )
    yield Outcome("out", result[0], exact[0], yardstick[0])
    yield Outcome("lse", result[1], exact[1], yardstick[1], unit=1.0)
    if case.page_lse:
        yield Outcome("page_lse", result[2], exact[2], yardstick[2], unit=1.0)


def attention_plan(name: str, case: AttentionCase) -> PlannedCheck:
    """Return the check of a case."""
    operation = LATENT_OPERATION if case.absorbed else OPERATION
    return PlannedCheck(operation, name, case.dtype, case.kind, functools.partial(attention_outcomes, case))


#: Rows long enough to be split over many programs.
LONG = AttentionCase("int4", "int4", batch=2, columns=301, full=True)

#: Query heads, KV heads, channels of keys and of values: of the models measured, then ones that need padding.
GEOMETRIES = (
    (32, 4, 128, 128),
    (64, 8, 64, 64),
    (4, 4, 192, 128),
    (16, 1, 128, 128),
    (8, 4, 80, 80),
    (4, 2, 96, 96),
    (2, 1, 256, 256),
    (2, 2, 16, 16),
)


#: Latents of DeepSeek-V3: 128 query heads, rank 512, rotary keys of 64 channels.
LATENTS = AttentionCase(kv_heads=1, group=128, dim=512, value_dim=64, absorbed=True)

#: Smaller ones, which compile in less than half of the time.
SMALL_LATENTS = dataclasses.replace(LATENTS, group=20, dim=96, value_dim=32)

#: Query heads, rank and channels of rotary keys: a share of DeepSeek-V3's heads, and what needs padding.
LATENT_GEOMETRIES = ((16, 512, 64), (20, 256, 32), (3, 40, 8), (5, 33, 5))

#: Kinds of latents and of rotary keys where they differ.
LATENT_MIXES: tuple[tuple[Kind, Kind], ...] = (("int8", "none"), ("int4", "none"), ("int2", "int8"), ("fp8", "int4"))


def attention_plans(*, quick: bool = False) -> list[PlannedCheck]:
    """Return the checks to run on a GPU, the ones that benchmarks rest on first."""
    dtypes = DTYPES[:1] if quick else DTYPES
    plans = [attention_plan("ragged rows", AttentionCase(kind, kind, dtype)) for dtype in dtypes for kind in KINDS]
    plans.append(attention_plan("long rows", LONG))
    plans += _latent_plans(dtypes)
    return plans if quick else [*plans, *_geometry_plans(), *_option_plans(), *_latent_option_plans()]


def _geometry_plans() -> Iterator[PlannedCheck]:
    for query, heads, dim, value_dim in GEOMETRIES:
        name = f"{query}/{heads} heads, {dim}/{value_dim} channels"
        case = AttentionCase(kv_heads=heads, group=query // heads, dim=dim, value_dim=value_dim)
        for kind in ("none", "int4"):
            yield attention_plan(name, dataclasses.replace(case, keys=kind, values=kind))


def _option_plans() -> Iterator[PlannedCheck]:
    for kind in KINDS:
        both = AttentionCase(kind, kind)
        yield attention_plan("page_lse", dataclasses.replace(both, page_lse=True))
        yield attention_plan("latent", dataclasses.replace(both, key_rank=16, value_rank=32))
    yield attention_plan("softcap", AttentionCase("int8", "int8", softcap=5.0))
    yield attention_plan("two kinds", AttentionCase("int8", "int4"))
    yield attention_plan("two kinds, one latent", AttentionCase("int2", "none", key_rank=24))
    yield attention_plan("one page", AttentionCase(batch=1, columns=1))
    for page_size in (5, 8, 16, 64):
        yield attention_plan(f"pages of {page_size}", AttentionCase("int4", "int8", page_size=page_size))


def _latent_plans(dtypes: Iterable[torch.dtype]) -> Iterator[PlannedCheck]:
    for dtype in dtypes:
        for kind in KINDS:
            case = LATENTS if dtype == torch.bfloat16 else SMALL_LATENTS
            yield attention_plan("ragged rows", dataclasses.replace(case, keys=kind, values=kind, dtype=dtype))
    for kind in ("none", "int4"):
        case = dataclasses.replace(LATENTS, keys=kind, batch=2, columns=301, full=True)
        yield attention_plan("long rows", case)


def _latent_option_plans() -> Iterator[PlannedCheck]:
    for heads, rank, rotary in LATENT_GEOMETRIES:
        case = dataclasses.replace(LATENTS, group=heads, dim=rank, value_dim=rotary)
        yield attention_plan(f"{heads} heads, {rank} and {rotary} channels", case)
    for keys, values in LATENT_MIXES:
        yield attention_plan("two kinds", dataclasses.replace(SMALL_LATENTS, keys=keys, values=values))
    for kind in ("none", "int4"):
        both = dataclasses.replace(SMALL_LATENTS, keys=kind, values=kind)
        yield attention_plan("page_lse", dataclasses.replace(both, page_lse=True))
        yield attention_plan("further channels", dataclasses.replace(both, key_rank=16, value_rank=8))
        yield attention_plan("softcap", dataclasses.replace(both, softcap=5.0))
        for page_size in (5, 16, 64):
            yield attention_plan(f"pages of {page_size}", dataclasses.replace(both, page_size=page_size))
