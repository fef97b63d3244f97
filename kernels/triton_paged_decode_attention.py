"""Triton version of :func:`.paged_decode_attention.paged_decode_attention`: launch parameters and the launch."""

import dataclasses
import functools
import math

import torch

from .page_codes import PageCodes
from .triton_decode_kernel import decode_kernel
from .triton_merge_partials import merge_partials
from .triton_pool import MIN_HEADS, block_channels, block_tokens, pool_operands, power_of_2

#: What `tuning` may hold.
TUNABLE = ("num_warps", "num_stages", "programs_per_processor", "splits")

# Fewer pages than this are not worth a program of their own and its share of the merge.
MIN_PAGES = 4
MAX_SPLITS = 256


def paged_decode_attention(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None,
    page_lse: bool,
    tuning: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the kernel; see the public function. The third result is None unless asked for."""
    batch, query_heads, _ = query.shape
    groups = query_heads // keys.heads
    columns = table.shape[1]
    launch = launch_parameters(keys, values, groups, query.dtype, tuning)
    blocks = batch * keys.heads * -(-groups // launch.heads)
    splits = launch.splits or split_count(blocks, columns, launch.programs * processors(query.device))
    out = query.new_empty((splits, batch, query_heads, values.width), dtype=torch.float32)
    lse = out.new_empty((splits, batch, query_heads))
    masses = out.new_full((batch, query_heads, columns), -torch.inf) if page_lse else None
    k, v = pool_operands(keys, torch.float16), pool_operands(values, torch.int8)
    if blocks:
        decode_kernel[(blocks * splits,)](
            query.contiguous(), *k.tensors, *v.tensors[:3], v.tensors[-1],
            table.contiguous(), lengths.contiguous(), counts.contiguous(), out, lse, masses,
            float(scale), 1.0 if softcap is None else float(softcap), k.pages, v.pages, columns, splits,
            HEADS=keys.heads, G=groups, BLOCK_G=launch.heads,
            P=keys.page_size, BLOCK_P=block_tokens(keys.page_size), **sizes(keys, values),
            KEY_KIND=keys.kind, VALUE_KIND=values.kind,
            SOFTCAP=softcap is not None, PAGE_LSE=page_lse, ASM=takes_ptx(query), STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0], masses
    return *merge_partials(out, lse, None), masses


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Launch parameters.

    Attributes
    ----------
    heads : int
        Query heads per program; further heads of the same KV head are taken by further programs, which find the page
        in the L2 cache.
    warps, stages : int
        Warps per program and stages of its pipeline.
    programs : int
        Programs wanted per multiprocessor.
    splits : int
        Parts of a row, 0 for as many as give that many programs.
    """

    heads: int
    warps: int
    stages: int
    programs: int
    splits: int


def launch_parameters(
    keys: PageCodes, values: PageCodes, groups: int, dtype: torch.dtype, tuning: dict[str, int]
) -> Launch:
    """Choose launch parameters.

    A program is one warp if its registers hold a page's operands and the sums, so that it never waits for others. The
    assembler's figures for compute capability 9.0 are behind the limits: beyond them registers spill.

    Raises
    ------
    ValueError
        If `tuning` holds anything but :data:`TUNABLE`.
    """
    check_tuning(tuning)
    plain = keys.kind == values.kind == "none"
    # With 16 heads, packed pages would spend more on their steps than a second visit costs.
    heads = min(16 if plain else MIN_HEADS, max(MIN_HEADS, power_of_2(groups)))
    held = heads * max(keys.width, values.width) * max(1, keys.page_size // 64)
    warps = 4 if dtype == torch.float32 or held > 2048 else 2 if held > 1024 else 1
    warps = tuning.get("num_warps", warps)
    # Triton spends half of the stages on looking up the page: with 3 one page is on its way while another is
    # multiplied, with 5 two are. A page that is stored as it is, is large enough to be one.
    stages = tuning.get("num_stages", 3 if plain else 5)
    return Launch(
        heads, warps, stages, tuning.get("programs_per_processor", max(1, 8 // warps)), tuning.get("splits", 0)
    )


def check_tuning(tuning: dict[str, int], tunable: tuple[str, ...] = TUNABLE) -> None:
    """Raise ValueError if `tuning` holds anything but launch parameters of these names."""
    if unknown := set(tuning) - set(tunable):
        raise ValueError(f"unknown tuning {sorted(unknown)}; there are {', '.join(tunable)}")


def split_count(blocks: int, columns: int, programs: int) -> int:
    """Return into how many parts to cut rows of some table columns, for a GPU that runs `programs` programs at once.

    The fewest whose rounds of programs leave hardly more of the GPU idle than the best number would: each further part
    costs a part of the merge.
    """
    return _fewest_splits(blocks, min(columns // MIN_PAGES, MAX_SPLITS, -(-4 * programs // max(1, blocks))), programs)


@functools.lru_cache(maxsize=1024)
def _fewest_splits(blocks: int, most: int, programs: int) -> int:
    rounds = [blocks * splits / programs for splits in range(1, max(1, most) + 1)]
    busy = [count / max(1, math.ceil(count)) for count in rounds]
    return next(splits for splits, share in enumerate(busy, 1) if share >= 0.85 * max(busy))


def sizes(keys: PageCodes, values: PageCodes) -> dict[str, int]:
    """Return the numbers of coded and latent channels that a kernel is compiled for, and how they are padded."""
    key_rest, value_rest = keys.width - keys.dim, values.width - values.dim
    return {
        "D": keys.dim, "L": key_rest, "BLOCK_C": block_channels(keys.dim), "BLOCK_L": max(16, power_of_2(key_rest)),
        "DV": values.dim, "LV": value_rest, "BLOCK_CV": block_channels(values.dim),
        "BLOCK_LV": max(16, power_of_2(value_rest)),
    }  # fmt: skip


def takes_ptx(query: torch.Tensor) -> bool:
    """Return whether kernels that multiply in a query's dtype may use PTX for it."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_bfloat16_ptx(query.device)


@functools.cache
def _has_bfloat16_ptx(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; the interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
