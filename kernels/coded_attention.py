"""Attention over packed pages on the CPU: in compressed space, a block of pages at a time in a small reused buffer.

Quantised keys meet the query as integers: a page's steps are folded into the query, which is shorter than the page, and
its floors become one number per query and page. Values are summed as integers and scaled once per page.
"""

import math
import threading

import torch

from .bit_packing import unpack
from .decode_pages import decode_pages
from .merge_partials import merge_pair
from .page_codes import BITS, FP8_MAX, PageCodes, floor_values, spread_values
from .partial_attention import MAX_LOGITS, partial_attention

# Numbers of one block as float32: small enough for a processor's cache, large enough to hide the calls.
BLOCK_BYTES = 4 * 1024 * 1024

# What float8 e4m3's exponent counts from, against float16's.
FP8_AS_HALF = 256

# What is made once for many blocks, the queries with a page's steps folded in, is made for so many bytes of them.
SPAN_BYTES = 4 * 1024 * 1024

_scratch = threading.local()


def coded_attention(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    scale: float,
    bias: torch.Tensor | None = None,
    holes: torch.Tensor | None = None,
    softcap: float | None = None,
    page_lse: torch.Tensor | None = None,
    absorbed: bool = False,
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
    page_lse : torch.Tensor, optional
        `(H, M, n)` float32, written to: the LSE of each page alone.
    absorbed : bool
        As in :func:`partial_attention`.

    Returns
    -------
    tuple of torch.Tensor
        `out` `(H, M, Dv + Lv)` and `lse` `(H, M)`, float32.
    """
    lanes, queries, _ = query.shape
    size = keys.page_size
    # Of a page: its logits, the queries with its steps folded in, and a quarter of what is read as it is.
    floats = lanes * max(queries * max(keys.dim, size, values.dim), size * max(map(_uncoded, (keys, values))) // 4)
    span = max(1, min(SPAN_BYTES // (4 * floats), MAX_LOGITS // (lanes * queries * size)))
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, keys.pages, span):
        stop = min(start + span, keys.pages)
        inside = None if holes is None else holes[(holes >= start * size) & (holes < stop * size)] - start * size
        cut = bias[..., start * size : stop * size] if bias is not None and bias.shape[-1] > 1 else bias
        pages = None if page_lse is None else page_lse[..., start:stop]
        span_codes = keys.narrow(start, stop), values.narrow(start, stop)
        part = _attend_span(query, *span_codes, scale, cut, inside, softcap, pages, absorbed)
        result = part if result is None else merge_pair(*result, *part)
    if result is None:
        out = query.new_zeros((lanes, queries, (keys if absorbed else values).width), dtype=torch.float32)
        return out, out.new_full((lanes, queries), -torch.inf)
    return result


def _uncoded(pages: PageCodes) -> int:
    return pages.width if pages.spread is None else pages.width - pages.dim


def _attend_span(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    scale: float,
    bias: torch.Tensor | None,
    holes: torch.Tensor | None,
    softcap: float | None,
    page_lse: torch.Tensor | None,
    absorbed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.shape[1] > keys.page_size or (absorbed and keys.outliers is not None):
        # More queries than tokens in a page: folding steps into the queries would cost more than decoding the keys.
        # Values have no outliers, and latents are values.
        return _attend_decoded(query, keys, values, scale, bias, holes, softcap, page_lse, absorbed)
    scaled = query.float() * scale
    if absorbed:
        rotary = page_logits(scaled[..., keys.width :], values).clone()
        logits, values = page_logits(scaled[..., : keys.width], keys).add_(rotary), keys
    else:
        logits = page_logits(scaled, keys)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits.add_(
            bias.expand(*bias.shape[:2], keys.pages * keys.page_size).unflatten(2, logits.shape[1::2]).transpose(1, 2)
        )
    if holes is not None and holes.numel():
        logits[:, holes // keys.page_size, :, holes % keys.page_size] = -torch.inf
    # A query without any visible key has peak -inf; anchored at a finite one its weights are all exp(-inf) = 0.
    peak = logits.amax(dim=(1, 3), keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    logits.sub_(peak).exp_()
    masses = logits.sum(dim=3)
    total = masses.sum(dim=1)
    lse = total.log() + peak[:, 0, :, 0]
    if page_lse is not None:
        torch.add(masses.log_().transpose(1, 2), peak[:, 0], out=page_lse)
    out = weighted_values(logits, values)
    return out.div_(total.clamp_min_(torch.finfo(torch.float32).tiny).unsqueeze(-1)), lse


def _attend_decoded(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    scale: float,
    bias: torch.Tensor | None,
    holes: torch.Tensor | None,
    softcap: float | None,
    page_lse: torch.Tensor | None,
    absorbed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    size, step = keys.page_size, _block_pages(keys, values)
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, keys.pages, step):
        slots = slice(start * size, min(start + step, keys.pages) * size)
        block = (decode_pages(p.narrow(start, start + step), query.dtype).flatten(1, 2) for p in (keys, values))
        inside = None if holes is None else holes[(holes >= slots.start) & (holes < slots.stop)] - slots.start
        cut = bias[..., slots] if bias is not None and bias.shape[-1] > 1 else bias
        pages = None if page_lse is None else page_lse[..., start : start + step]
        part = partial_attention(query, next(block), next(block), scale, cut, inside, softcap, pages, absorbed)
        result = part if result is None else merge_pair(*result, *part)
    assert result is not None
    return result


def _block_pages(*pages: PageCodes) -> int:
    """Return how many pages to turn into numbers at a time."""
    widest = max(each.dim for each in pages)
    return max(1, BLOCK_BYTES // (4 * pages[0].heads * pages[0].page_size * widest))


def page_logits(query: torch.Tensor, keys: PageCodes) -> torch.Tensor:
    """Return the products of queries `(H, M, D + L)` float32 with the keys of n pages, `(H, n, M, P)` float32.

    They are in memory that the next call may overwrite.
    """
    shape = keys.pages, keys.page_size
    if keys.spread is None:
        # As they are: one product per head for all pages.
        logits = torch.bmm(query[..., : keys.dim], keys.codes.flatten(1, 2).float().transpose(1, 2))
        logits = logits.unflatten(2, shape).transpose(1, 2)
    else:
        logits = _coded_logits(query[:, None, :, : keys.dim], keys)
    if keys.latent is not None:
        latent = torch.bmm(query[..., keys.dim :], keys.latent.flatten(1, 2).float().transpose(1, 2))
        logits.add_(latent.unflatten(2, shape).transpose(1, 2))
    return logits


def _coded_logits(query: torch.Tensor, keys: PageCodes) -> torch.Tensor:
    """Return the products of queries `(H, 1, M, D)` with coded channels."""
    step = _steps(keys)
    shape = (*step.shape[:2], query.shape[2])
    folded = torch.mul(query, step.unsqueeze(2), out=_buffer("queries", (*shape, keys.dim), query.device))
    logits = _buffer("logits", (*shape, keys.page_size), query.device)
    for start in range(0, keys.pages, size := _block_pages(keys)):
        block = slice(start, min(start + size, keys.pages))
        products = torch.matmul(folded[:, block], _numbers(keys.narrow(block.start, block.stop)).transpose(2, 3))
        logits[:, block] = products[..., : keys.page_size]
    if keys.floor is None:
        return logits
    offset = torch.bmm(floor_values(keys), query[:, 0].transpose(1, 2))
    if keys.outliers is not None and keys.fine is not None:
        # A fine part f stands for step * ((f + 0.5) / 16 - 0.5).
        index = keys.outliers.long().unsqueeze(2).expand(-1, -1, query.shape[2], -1)
        few = folded.gather(-1, index).mul_(1 / 16)
        offset.sub_(few.sum(dim=-1), alpha=7.5)
        fine = unpack(keys.fine, 4, keys.page_size).float()
        logits.flatten(0, 1).baddbmm_(few.flatten(0, 1), fine.flatten(0, 1).transpose(1, 2))
    return logits.add_(offset.unsqueeze(-1))


def weighted_values(weights: torch.Tensor, values: PageCodes) -> torch.Tensor:
    """Return the sum of the values of n pages with weights `(H, n, M, P)` float32, `(H, M, Dv + L)` float32."""
    flat = None
    if values.spread is None or values.latent is not None:
        flat = weights.transpose(1, 2).flatten(2)
    if values.spread is None:
        assert flat is not None
        out = torch.bmm(flat, values.codes.flatten(1, 2).float())
    else:
        out = _coded_sum(weights, values)
    if values.latent is None:
        return out
    assert flat is not None
    return torch.cat([out, torch.bmm(flat, values.latent.flatten(1, 2).float())], dim=-1)


def _coded_sum(weights: torch.Tensor, values: PageCodes) -> torch.Tensor:
    out = weights.new_zeros((*weights.shape[::2], values.dim))
    steps = _steps(values).unsqueeze(2)
    for start in range(0, values.pages, size := _block_pages(values)):
        block = slice(start, min(start + size, values.pages))
        numbers = _numbers(values.narrow(block.start, block.stop))[:, :, : values.page_size]
        out += torch.matmul(weights[:, block], numbers).mul_(steps[:, block]).sum(dim=1)
    if values.floor is not None:
        out.baddbmm_(weights.sum(dim=-1).transpose(1, 2), floor_values(values))
    return out


def _steps(pages: PageCodes) -> torch.Tensor:
    """Return what one unit of :func:`_numbers` stands for, `(H, N, D)` float32."""
    assert pages.spread is not None
    return spread_values(pages.spread) * (FP8_AS_HALF / FP8_MAX if pages.kind == "fp8" else 1 / pages.levels)


def _numbers(pages: PageCodes) -> torch.Tensor:
    """Return the codes of a block as float32 `(H, N, P', D)` in the scratch buffer.

    There are `P' >= P` rows; those beyond a page's last token are zero.
    """
    per_byte = 8 // BITS.get(pages.kind, 8)
    numbers = _buffer(
        "numbers", (*pages.codes.shape[:2], pages.codes.shape[2] * per_byte, pages.dim), pages.codes.device
    )
    if pages.kind == "fp8":
        return numbers.copy_(_half_of_fp8(pages.codes))
    if per_byte == 1:
        return numbers.copy_(pages.codes)
    bits = 8 // per_byte
    for plane, rows in enumerate(numbers.chunk(per_byte, dim=2)):
        shifted = pages.codes >> (plane * bits) if plane else pages.codes
        rows.copy_(shifted if plane == per_byte - 1 else shifted & (2**bits - 1))
    return numbers


def _half_of_fp8(codes: torch.Tensor) -> torch.Tensor:
    """Return float8 e4m3 bits as float16 numbers, FP8_AS_HALF times too small.

    Both formats put the exponent after the sign; moved there, e4m3's is only counted from another zero. Converting
    the dtype itself takes ten times as long on a CPU.
    """
    # Extended to 16 bits and moved up by 7, the sign is also where float16 has its highest bit of the exponent.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16)


def _buffer(purpose: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return uninitialised float32 memory that the next call for this purpose on this thread may overwrite.

    Memory fresh from the system is cleared page by page when it is first touched, which takes longer than using it.
    """
    count = math.prod(shape)
    buffers = _scratch.__dict__.setdefault("buffers", {})
    if (purpose, device) not in buffers or buffers[purpose, device].numel() < count:
        buffers[purpose, device] = torch.empty(count, dtype=torch.float32, device=device)
    return buffers[purpose, device][:count].view(shape)
