"""Attention over packed pages on the CPU: in compressed space, a block of pages at a time in a small reused buffer.

Quantised keys meet the query as integers: a page's steps are folded into the query, which is shorter than the page, and
its floors become one number per query and page. Values are summed as integers and scaled once per page.
"""

import threading
from collections.abc import Iterator

import torch

from .merge_partials import merge_pair
from .open_pages import open_pages
from .page_codes import BITS, FP8_MAX, PageCodes, floor_values, spread_values
from .partial_attention import MAX_LOGITS, partial_attention, softmax_stats

# Integers of one block as float32: small enough for a processor's cache, large enough to hide the calls.
BLOCK_BYTES = 4 * 1024 * 1024

_scratch = threading.local()


def coded_attention(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    scale: float,
    bias: torch.Tensor | None = None,
    holes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over all given pages.

    Parameters
    ----------
    query : torch.Tensor
        `(H, M, D + L)`: H independent lanes, M queries each.
    keys, values : PageCodes
        The lanes' n pages; kinds and head dims may differ.
    scale, softcap
        As in :func:`partial_attention`.
    bias : torch.Tensor, optional
        Added to the logits, broadcastable to `(H, M, n * P)`; `-inf` hides a key.
    holes : torch.Tensor, optional
        `(k,)` int64 indices into `n * P` of slots that hold no token.

    Returns
    -------
    tuple of torch.Tensor
        `out` `(H, M, Dv + Lv)` and `lse` `(H, M)`, float32.
    """
    lanes, queries, _ = query.shape
    size = keys.page_size
    widest = max(keys.width, values.width, queries)
    step = max(1, min(BLOCK_BYTES // (4 * lanes * size * widest), MAX_LOGITS // (lanes * queries * size)))
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, keys.pages, step):
        stop = min(start + step, keys.pages)
        inside = None if holes is None else holes[(holes >= start * size) & (holes < stop * size)] - start * size
        cut = bias[..., start * size : stop * size] if bias is not None and bias.shape[-1] > 1 else bias
        block = keys.narrow(start, stop), values.narrow(start, stop)
        part = _attend_block(query, *block, scale, cut, inside, softcap)
        result = part if result is None else merge_pair(*result, *part)
    if result is None:
        out = query.new_zeros((lanes, queries, values.width), dtype=torch.float32)
        return out, out.new_full((lanes, queries), -torch.inf)
    return result


def _attend_block(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    scale: float,
    bias: torch.Tensor | None,
    holes: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.shape[1] > keys.page_size:
        # More queries than tokens in a page: folding steps into the queries would cost more than decoding the keys.
        dense_keys, dense_values = (open_pages(pages, query.dtype).flatten(1, 2) for pages in (keys, values))
        return partial_attention(query, dense_keys, dense_values, scale, bias, holes, softcap)
    logits = page_logits(query.float() * scale, keys).flatten(2)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits.add_(bias)
    if holes is not None and holes.numel():
        logits.index_fill_(2, holes, -torch.inf)
    total, lse = softmax_stats(logits)
    out = weighted_values(logits.unflatten(2, (keys.pages, keys.page_size)), values)
    return out.div_(total.clamp_min_(torch.finfo(torch.float32).tiny)), lse


def page_logits(query: torch.Tensor, keys: PageCodes) -> torch.Tensor:
    """Return the products of queries `(H, M, D + L)` float32 with the keys of n pages, `(H, M, n, P)` float32."""
    if keys.kind == "none" and keys.latent is None:
        flat = keys.codes.flatten(1, 2).float()
        return torch.bmm(query, flat.transpose(1, 2)).unflatten(2, (keys.pages, keys.page_size))
    queries, dim, size = query.shape[1], keys.dim, keys.page_size
    coded = query[:, None, :, :dim]
    if keys.spread is None:
        parts = [coded.expand(-1, keys.pages, -1, -1)]
    else:
        step = _steps(keys)
        parts = [coded * step.unsqueeze(2)]
        if keys.outliers is not None:
            index = keys.outliers.long()
            few = query[:, :, :dim].unsqueeze(1).expand(-1, keys.pages, -1, -1)
            few = few.gather(-1, index.unsqueeze(2).expand(-1, -1, queries, -1))
            parts.append(few * step.gather(-1, index).unsqueeze(2))
    if keys.latent is not None:
        parts.append(query[:, None, :, dim:].expand(-1, keys.pages, -1, -1))
    folded = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    logits = torch.matmul(folded, _numbers(keys).transpose(2, 3))[..., :size]
    if keys.floor is not None:
        logits += torch.bmm(floor_values(keys), query[:, :, :dim].transpose(1, 2)).unsqueeze(-1)
    return logits.transpose(1, 2)


def weighted_values(weights: torch.Tensor, values: PageCodes) -> torch.Tensor:
    """Return the sum of the values of n pages with weights `(H, M, n, P)` float32, `(H, M, Dv + L)` float32."""
    if values.kind == "none" and values.latent is None:
        return torch.bmm(weights.flatten(2), values.codes.flatten(1, 2).float())
    numbers = _numbers(values)
    paged = weights.transpose(1, 2)
    if (missing := numbers.shape[2] - values.page_size) > 0:
        paged = torch.nn.functional.pad(paged, (0, missing))
    sums = torch.matmul(paged, numbers)
    if values.spread is None:
        return sums.sum(dim=1)
    step = _steps(values)
    dim = values.dim
    sums[..., :dim].mul_(step.unsqueeze(2))
    out = sums.sum(dim=1)
    if values.floor is not None:
        out[..., :dim].baddbmm_(weights.sum(dim=-1), floor_values(values))
    return out


def _steps(pages: PageCodes) -> torch.Tensor:
    """Return what one unit of the stored numbers stands for, `(H, N, D)` float32."""
    assert pages.spread is not None
    return spread_values(pages.spread) / (FP8_MAX if pages.kind == "fp8" else pages.levels)


def _numbers(pages: PageCodes) -> torch.Tensor:
    """Return the stored numbers of a block as float32 `(H, N, P', ...)` in the scratch buffer, `P' >= P`.

    Coded channels come first, then the fine parts of the outliers, then the latent channels.
    """
    few = 0 if pages.fine is None else pages.fine.shape[-1]
    per_byte = 8 // BITS.get(pages.kind, 8)
    tokens = pages.codes.shape[2] * per_byte
    dim = pages.dim
    numbers = _buffer((*pages.codes.shape[:2], tokens, pages.width + few), pages.codes.device)
    if pages.kind == "fp8":
        numbers[..., :dim].copy_(pages.codes.view(torch.float8_e4m3fn))
    elif per_byte == 1:
        numbers[..., :dim].copy_(pages.codes)
    else:
        for rows, plane in zip(_planes(numbers[..., :dim], per_byte), _unpacked(pages.codes, per_byte), strict=True):
            rows.copy_(plane)
    if pages.fine is not None:
        fine = numbers[..., dim : dim + few]
        # The rows beyond a page's last token stay as they are: nobody looks at their logits.
        half = pages.fine.shape[2]
        for start, plane in zip((0, half), _unpacked(pages.fine, 2), strict=True):
            stop = min(start + half, pages.page_size)
            fine[:, :, start:stop].copy_(plane[:, :, : stop - start])
        fine.add_(0.5).mul_(1 / 16).sub_(0.5)
    if pages.latent is not None:
        numbers[..., dim + few :].zero_()
        numbers[:, :, : pages.page_size, dim + few :].copy_(pages.latent)
    return numbers


def _planes(numbers: torch.Tensor, per_byte: int) -> Iterator[torch.Tensor]:
    return iter(numbers.chunk(per_byte, dim=2))


def _unpacked(codes: torch.Tensor, per_byte: int) -> Iterator[torch.Tensor]:
    bits = 8 // per_byte
    for plane in range(per_byte):
        shifted = codes if plane == 0 else codes >> (plane * bits)
        yield shifted if plane == per_byte - 1 else shifted & (2**bits - 1)


def _buffer(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return uninitialised float32 memory that the next call on this thread may overwrite."""
    count = 1
    for extent in shape:
        count *= extent
    held = getattr(_scratch, "buffers", None)
    if held is None:
        held = _scratch.buffers = {}
    if device not in held or held[device].numel() < count:
        held[device] = torch.empty(count, dtype=torch.float32, device=device)
    return held[device][:count].view(shape)
