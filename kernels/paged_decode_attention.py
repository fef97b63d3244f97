"""Attention of one new token per row over its pages: the decode step."""

import numpy as np
import torch

from .decode_pages import decode_pages
from .dispatch import choose, run
from .merge_partials import merge_pair
from .page_codes import PageCodes, coded_dims
from .page_lists import ListedPool, PageLists, is_listable
from .partial_attention import partial_attention

# The decoded tokens and the logits of one block of pages stay below this.
MAX_BLOCK_BYTES = 64 * 1024 * 1024


def paged_decode_attention(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    page_lse: bool = False,
    absorbed: bool = False,
    backend: str | None = None,
    tuning: dict[str, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attend with one query per row to the pages of the row.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, D + L)` float32, float16 or bfloat16, `Hq = H * G`; heads `h * G .. h * G + G - 1` read KV head h.
    keys, values : PageCodes
        The pool: N pages of P tokens of H heads, with D + L and Dv + Lv channels; their kinds may differ.
    table : torch.Tensor
        `(B, n)` int32 page numbers.
    lengths : torch.Tensor
        `(B,)` int32, entries of the table in use per row. Those beyond are never read, whatever they hold.
    counts : torch.Tensor
        `(N,)` int32, tokens in each page, 0..P. Slots beyond take no part, whatever they hold.
    scale : float
        Factor on the logits.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)` (Gemma-style).
    page_lse : bool
        Whether to return the log-sum-exp of each page too.
    absorbed : bool
        As in :func:`.partial_attention`: `keys` are latents, which are the values too, and `values` the rotary parts of
        the keys. The query is `(B, Hq, D + L + Dv + Lv)`, channels of latents first, and the output `(B, Hq, D + L)`.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.
    tuning : dict, optional
        Launch parameters of the Triton kernel that replace its own choice: `num_warps`, `num_stages`,
        `programs_per_processor`, or the number of parts of a row, `splits`. The kernel for latents takes its query
        heads per program, `heads`, and tokens at a time, `tokens`, too: powers of two of at least 16.

    Returns
    -------
    out : torch.Tensor
        `(B, Hq, Dv + Lv)` float32, 0 where a row has no token.
    lse : torch.Tensor
        `(B, Hq)` float32, log-sum-exp of the logits, `-inf` where a row has no token.
    page_lse : torch.Tensor
        Only if asked for: `(B, Hq, n)` float32, that of the logits of each page alone; `exp(page_lse - lse)` is the
        page's share of the attention. `-inf` for pages without tokens and entries not in use.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    _check(query, keys, values, table, lengths, counts, absorbed)
    how = choose(query.device, backend, coded_dims(keys, values), compiled=not absorbed and is_listable(keys, values))
    if how == "numba":
        return _attend_listed(query, keys, values, table, lengths, counts, scale, softcap, page_lse)
    if how != "torch":
        operation = "absorbed_decode_attention" if absorbed else "paged_decode_attention"
        arguments = (query, keys, values, table, lengths, counts, scale, softcap, page_lse, tuning or {})
        out, lse, masses = run(operation, how, query.device, *arguments)
        return (out, lse, masses) if page_lse else (out, lse)
    return _attend(query, keys, values, table, lengths, counts, scale, softcap, page_lse, absorbed)


def _attend_listed(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None,
    page_lse: bool,
) -> tuple[torch.Tensor, ...]:
    """Attend as :func:`paged_decode_attention` does, on a CPU."""
    pool = ListedPool(keys, values, counts.numpy().astype(np.int16))
    numbers, used = table.numpy().astype(np.int64), lengths.numpy()
    counted = np.arange(numbers.shape[1]) < used[:, None]
    starts = np.concatenate([[0], np.cumsum(used, dtype=np.int64)])
    lists = PageLists([pool], numbers[counted], starts, len(table), "numba")
    masses = query.new_full((*query.shape[:2], numbers.shape[1]), -torch.inf, dtype=torch.float32)
    out, lse = lists.attend(query, scale, softcap, masses if page_lse else None)
    return (out, lse, masses) if page_lse else (out, lse)


def _attend(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None,
    page_lse: bool,
    absorbed: bool,
) -> tuple[torch.Tensor, ...]:
    batch, query_heads, _ = query.shape
    out = query.new_zeros((batch, query_heads, (keys if absorbed else values).width), dtype=torch.float32)
    lse = out.new_full((batch, query_heads), -torch.inf)
    masses = out.new_full((batch, query_heads, table.shape[1]), -torch.inf)
    for row, length in enumerate(lengths.tolist()):
        grouped = query[row].view(keys.heads, query_heads // keys.heads, -1)
        for start in range(0, length, step := _pages_per_block(grouped, keys, values)):
            block = table[row, start : min(start + step, length)].long()
            part_out, part_lse, part_masses = _attend_block(
                grouped, keys, values, block, counts, scale, softcap, absorbed
            )
            out[row], lse[row] = merge_pair(out[row], lse[row], part_out, part_lse)
            masses[row, :, start : start + len(block)] = part_masses
    return (out, lse, masses) if page_lse else (out, lse)


def _attend_block(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    block: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    softcap: float | None,
    absorbed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend with `(H, G, D + L)` to some pages: `(Hq, Dv + Lv)`, `(Hq,)` and the LSE of each page `(Hq, pages)`."""
    empty = torch.arange(keys.page_size, device=block.device) >= counts[block].unsqueeze(1)
    # (H, pages, P, channels); a slot that holds no token may hold NaN, and neither 0 * NaN nor NaN - inf is a number.
    k, v = (decode_pages(pool.pick(block), query.dtype).masked_fill(empty[..., None], 0) for pool in (keys, values))
    holes = empty.view(-1).nonzero().squeeze(1)
    whole = k.flatten(1, 2), v.flatten(1, 2)
    out, lse = partial_attention(query, *whole, scale, holes=holes, softcap=softcap, absorbed=absorbed)
    heads, groups = query.shape[:2]
    by_page = query.repeat_interleave(len(block), dim=0)
    hidden = torch.zeros(empty.shape, device=block.device).masked_fill_(empty, -torch.inf)
    pages, bias = (k.flatten(0, 1), v.flatten(0, 1)), hidden.repeat(heads, 1).unsqueeze(1)
    _, masses = partial_attention(by_page, *pages, scale, bias=bias, softcap=softcap, absorbed=absorbed)
    return out.flatten(0, 1), lse.flatten(), masses.view(heads, -1, groups).transpose(1, 2).flatten(0, 1)


def _pages_per_block(query: torch.Tensor, keys: PageCodes, values: PageCodes) -> int:
    # Decoding holds some float32 copies of a page at a time, attention the logits.
    per_token = query.shape[0] * (6 * max(keys.width, values.width) + 4 * query.shape[1])
    return max(1, MAX_BLOCK_BYTES // (4 * per_token * keys.page_size))


def _check(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    absorbed: bool,
) -> None:
    heads, pages = keys.codes.shape[:2]
    if (values.heads, values.pages, values.page_size) != (heads, pages, keys.page_size):
        raise ValueError(
            f"keys have {heads} heads of {pages} pages of {keys.page_size} tokens, "
            f"values {values.heads} of {values.pages} of {values.page_size}"
        )
    width = keys.width + values.width if absorbed else keys.width
    if query.dim() != 3 or query.shape[2] != width or query.shape[1] % heads:
        raise ValueError(f"query of shape {tuple(query.shape)} for {heads} KV heads of {width} channels")
    batch = query.shape[0]
    if table.dim() != 2 or table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(f"table {tuple(table.shape)} and lengths {tuple(lengths.shape)} for {batch} rows")
    if counts.shape != (pages,):
        raise ValueError(f"counts of shape {tuple(counts.shape)} for {pages} pages")
