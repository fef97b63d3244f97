"""Triton version of :func:`.paged_decode_attention.paged_decode_attention` over latents: the launch, its parameters."""

import functools
from typing import Any

import torch

from .page_codes import PageCodes
from .triton_absorbed_kernel import absorbed_kernel
from .triton_merge_partials import merge_partials
from .triton_paged_decode_attention import TUNABLE, Launch, check_tuning, processors, split_count, takes_ptx
from .triton_pool import CENTRES, block_channels, block_tokens, layout, pool_operands, power_of_2

#: What `tuning` may hold.
LATENT_TUNABLE = (*TUNABLE, "heads", "tokens")

#: Query heads per program and tokens per tile at most: 64 rows are what a Hopper GPU multiplies at once, and their sums
#: of 512 latent channels take half of the registers of its eight warps.
MOST_HEADS, MOST_TOKENS = 64, 64

#: Bytes of a tile of tokens. Beside the queries there are up to two in shared memory, three with 64 heads.
TILE_BYTES = 40 * 1024

#: Shared memory that a program may have where it is not known: of the smallest of today's GPUs.
SHARED_BYTES = 99 * 1024


def absorbed_decode_attention(
    query: torch.Tensor,
    latents: PageCodes,
    rotary: PageCodes,
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
    groups, columns, slots = query_heads // latents.heads, table.shape[1], block_tokens(latents.page_size)
    check_tuning(tuning, LATENT_TUNABLE)
    launch = launch_parameters(latents, rotary, groups, query.dtype, shared_bytes(query.device), tuning)
    tokens = tuning.get("tokens", tile_tokens(latents, rotary, query.dtype))
    if page_lse or latents.kind != "none" or rotary.kind != "none":
        # The steps of a page, and its log-sum-exp, are those of all tokens of a tile.
        tokens = min(tokens, slots)
    tiles = max(1, slots // tokens)
    blocks = batch * latents.heads * -(-groups // launch.heads)
    splits = launch.splits or split_count(blocks, columns, launch.programs * processors(query.device))
    out = query.new_empty((splits, batch, query_heads, latents.width), dtype=torch.float32)
    lse = out.new_empty((splits, batch, query_heads))
    masses = out.new_full((batch, query_heads, columns * tiles), -torch.inf) if page_lse else None
    k, r = pool_operands(latents, torch.float16), pool_operands(rotary, torch.int8)
    if blocks:
        absorbed_kernel[(blocks * splits,)](
            query.contiguous(), *k.tensors, *r.tensors,
            table.contiguous(), lengths.contiguous(), counts.contiguous(), out, lse, masses,
            float(scale), 1.0 if softcap is None else float(softcap), k.pages, r.pages, columns, splits,
            HEADS=latents.heads, G=groups, BLOCK_H=launch.heads, P=latents.page_size, BLOCK_P=slots, BLOCK_N=tokens,
            **_constants(latents, "LATENT", ("R", "L", "BLOCK_C", "BLOCK_L")),
            **_constants(rotary, "ROTARY", ("DR", "LR", "BLOCK_CR", "BLOCK_LR")),
            SOFTCAP=softcap is not None, PAGE_LSE=page_lse, ASM=takes_ptx(query), STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    if masses is not None and tiles > 1:
        masses = masses.unflatten(2, (columns, tiles)).logsumexp(dim=3)
    if splits == 1:
        return out[0], lse[0], masses
    return *merge_partials(out, lse, None), masses


def tile_tokens(latents: PageCodes, rotary: PageCodes, dtype: torch.dtype) -> int:
    """Return how many tokens are read at a time, a power of two of at least 16."""
    fitting = TILE_BYTES // _token_bytes(latents, rotary, dtype)
    return max(16, min(MOST_TOKENS, power_of_2(fitting + 1) // 2))


def launch_parameters(
    latents: PageCodes, rotary: PageCodes, groups: int, dtype: torch.dtype, shared: int, tuning: dict[str, int]
) -> Launch:
    """Choose launch parameters; `shared` is the shared memory in bytes that a program may have.

    The assembler's figures for compute capability 9.0 are behind the warps: with fewer of them registers spill.
    """
    plain = latents.kind == rotary.kind == "none"
    heads = tuning.get("heads", _most_heads(latents, rotary, groups, dtype, shared))
    warps = tuning.get("num_warps", 4 if plain and heads == 16 and dtype != torch.float32 else 8)
    # With 3 stages one tile is on its way while another is multiplied.
    stages = tuning.get("num_stages", 3 if _fits(heads, latents, rotary, dtype, shared) else 2)
    programs = tuning.get("programs_per_processor", 3 if plain and heads == 16 else 1)
    return Launch(heads, warps, stages, programs, tuning.get("splits", 0))


def _most_heads(latents: PageCodes, rotary: PageCodes, groups: int, dtype: torch.dtype, shared: int) -> int:
    """Return as many query heads per program as there are, as registers hold, and as shared memory has room for."""
    if dtype == torch.float32:
        # Not multiplied by tensor cores.
        return 16
    heads = max(16, min(MOST_HEADS, power_of_2(groups)))
    while heads > 16 and not _fits(heads, latents, rotary, dtype, shared):
        heads //= 2
    return heads


def _fits(heads: int, latents: PageCodes, rotary: PageCodes, dtype: torch.dtype, shared: int) -> bool:
    """Return whether shared memory has room for queries and tiles, as Triton 3.3 keeps them; newer ones need less."""
    tiles = 3 if heads > 32 else 2
    rows = heads + tiles * tile_tokens(latents, rotary, dtype)
    return rows * _token_bytes(latents, rotary, dtype) <= shared - 4096


def _token_bytes(latents: PageCodes, rotary: PageCodes, dtype: torch.dtype) -> int:
    """Return the bytes that a token, or a query, takes in shared memory once it is decoded."""
    return dtype.itemsize * 2 * sum(block_channels(pages.dim) for pages in (latents, rotary))


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that a program may have."""
    if device.type != "cuda":
        return SHARED_BYTES
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_BYTES)


def _constants(pages: PageCodes, prefix: str, names: tuple[str, str, str, str]) -> dict[str, Any]:
    """Return what the kernel is compiled for, of one of the pools."""
    bits, rows, _, log_levels = layout(pages)
    rest = pages.width - pages.dim
    sizes = pages.dim, rest, block_channels(pages.dim), max(16, power_of_2(rest))
    floor = "none" if pages.floor is None else "float16" if pages.floor.dtype == torch.float16 else "int8"
    of_kind = {
        "KIND": pages.kind, "ROWS": rows, "BITS": bits, "LOG_LEVELS": log_levels, "CENTRE": CENTRES[pages.kind],
        "FLOOR": floor, "OUTLIERS": pages.outliers is not None,
    }  # fmt: skip
    return dict(zip(names, sizes, strict=True)) | {f"{prefix}_{name}": value for name, value in of_kind.items()}
