"""Triton version of :func:`.paged_decode_attention.paged_decode_attention`: launch parameters and the launch."""

import functools
from typing import Any

import torch

from .page_codes import PageCodes
from .triton_decode_kernel import decode_kernel
from .triton_merge_partials import merge_partials
from .triton_pool import CENTRES, block_channels, block_tokens, layout, pool_operands, power_of_2

#: What `tuning` may hold.
TUNABLE = ("num_warps", "num_stages", "programs_per_processor", "splits")

# Fewer pages than this are not worth a program of their own and its share of the merge.
MIN_PAGES = 4
MAX_SPLITS = 256
# Query heads that one program takes; more are taken by further programs, which find the page in the L2 cache.
MAX_HEADS = 16


def paged_decode_attention(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None,
    *,
    page_lse: bool,
    tuning: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the kernel; see the public function. The third result is None unless asked for."""
    batch, query_heads, _ = query.shape
    groups = query_heads // keys.heads
    columns = table.shape[1]
    block_g = min(MAX_HEADS, max(8, power_of_2(groups)))
    warps, stages, programs, splits = launch_parameters(keys, values, block_g, query.dtype, tuning)
    blocks = batch * keys.heads * -(-groups // block_g)
    splits = splits or split_count(blocks, columns, programs * _processors(query.device))
    out = query.new_empty((splits, batch, query_heads, values.width), dtype=torch.float32)
    lse = out.new_empty((splits, batch, query_heads))
    masses = out.new_full((batch, query_heads, columns), -torch.inf) if page_lse else None
    k, v = pool_operands(keys, torch.float16), pool_operands(values, torch.int8)
    if blocks:
        decode_kernel[(blocks * splits,)](
            query.contiguous(), *k.tensors, *v.tensors[:3], v.tensors[-1],
            table.contiguous(), lengths.contiguous(), counts.contiguous(), out, lse, masses,
            float(scale), 1.0 if softcap is None else float(softcap), k.pages, v.pages, columns, splits,
            HEADS=keys.heads, G=groups, BLOCK_G=block_g, P=keys.page_size, BLOCK_P=block_tokens(keys.page_size),
            **key_constants(keys), **value_constants(values),
            SOFTCAP=softcap is not None, PAGE_LSE=page_lse, ASM=_takes_ptx(query), STAGES=stages,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0], masses
    return *merge_partials(out, lse, None), masses


def launch_parameters(
    keys: PageCodes, values: PageCodes, block_g: int, dtype: torch.dtype, tuning: dict[str, int]
) -> tuple[int, int, int, int]:
    """Return warps per program, pipeline stages, programs per multiprocessor and splits (0: by the number of programs).

    One warp holds the sums of 8 heads of 128 channels, so that its programs never wait for one another; larger ones
    would spill registers.
    """
    if unknown := set(tuning) - set(TUNABLE):
        raise ValueError(f"unknown tuning {sorted(unknown)}; there are {', '.join(TUNABLE)}")
    held = block_g * max(keys.width, values.width)
    warps = 4 if dtype == torch.float32 else 1 if held <= 1024 else 2 if held <= 2048 else 4
    warps = tuning.get("num_warps", warps)
    # Two of the stages look up the page; one page is then on its way while the one before is multiplied.
    stages = tuning.get("num_stages", 3)
    return warps, stages, tuning.get("programs_per_processor", max(1, 8 // warps)), tuning.get("splits", 0)


def split_count(blocks: int, columns: int, programs: int) -> int:
    """Return into how many parts to cut the rows of a table of some columns to give `programs` programs work."""
    return max(1, min(-(-programs // max(1, blocks)), columns // MIN_PAGES, MAX_SPLITS))


def key_constants(keys: PageCodes) -> dict[str, Any]:
    """Return what the kernel is compiled for, of the keys."""
    bits, rows, tile, log_levels = layout(keys)
    return {
        "KEY_KIND": keys.kind, "D": keys.dim, "L": keys.width - keys.dim, "KEY_BITS": bits, "KEY_ROWS": rows,
        "KEY_TILE": tile, "KEY_LOG_LEVELS": log_levels, "KEY_CENTRE": CENTRES[keys.kind],
        "BLOCK_C": block_channels(keys.dim), "BLOCK_L": max(16, power_of_2(keys.width - keys.dim)),
        "OUTLIERS": keys.outliers is not None,
    }  # fmt: skip


def value_constants(values: PageCodes) -> dict[str, Any]:
    """Return what the kernel is compiled for, of the values."""
    bits, rows, tile, log_levels = layout(values)
    return {
        "VALUE_KIND": values.kind, "DV": values.dim, "LV": values.width - values.dim, "VALUE_BITS": bits,
        "VALUE_ROWS": rows, "VALUE_TILE": tile, "VALUE_LOG_LEVELS": log_levels, "VALUE_CENTRE": CENTRES[values.kind],
        "BLOCK_CV": block_channels(values.dim), "BLOCK_LV": max(16, power_of_2(values.width - values.dim)),
    }  # fmt: skip


def _takes_ptx(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_bfloat16_ptx(query.device)


@functools.cache
def _has_bfloat16_ptx(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; the interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
