"""Which pages a query is likely to look at, from a summary of each."""

import torch

from .dispatch import choose, run
from .page_codes import spread_values


def page_scores(
    query: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Score the pages of each row: an upper bound of their logits (Quest, arXiv 2406.10774), or a centroid's logit.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, D)` floating point, `Hq = H * G`.
    low : torch.Tensor
        `(H, N, D)` floating point, the least value of each channel in each page, or the page's centroid.
    high : torch.Tensor or None
        `(H, N, D)`: the largest values, floating point, or uint8 codes of the spreads above `low`, see
        :func:`pikv_hf.kernels.page_codes.spread_values`; None if `low` is a centroid.
    table : torch.Tensor
        `(B, n)` int32 page numbers.
    lengths : torch.Tensor
        `(B,)` int32, entries of the table in use per row. Those beyond are never read, whatever they hold.
    backend : str, optional
        See :func:`pikv_hf.kernels.dispatch.choose`.

    Returns
    -------
    torch.Tensor
        `(B, H, n)` float32: the largest, over the G query heads of a KV head, of `sum_d max(q_d low_d, q_d high_d)`, or
        of `q . centroid`; `-inf` for entries not in use.

    Raises
    ------
    ValueError
        If shapes do not match.
    """
    heads, _, dim = low.shape
    batch = query.shape[0]
    if query.dim() != 3 or query.shape[2] != dim or query.shape[1] % heads:
        raise ValueError(f"query of shape {tuple(query.shape)} for {heads} KV heads of {dim} channels")
    if high is not None and high.shape != low.shape:
        raise ValueError(f"high of shape {tuple(high.shape)} with low of {tuple(low.shape)}")
    if table.dim() != 2 or table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(f"table {tuple(table.shape)} and lengths {tuple(lengths.shape)} for {batch} rows")
    how = choose(query.device, backend)
    if how != "torch":
        scored: torch.Tensor = run("page_scores", how, query.device, query, low, high, table, lengths)
        return scored
    if _covers(lengths, low.shape[1], batch):
        # Most pages are someone's: one product for all of them is cheaper than gathering each row's.
        return _looked_up(_bounds(query.view(batch, heads, -1, dim).transpose(0, 1), low, high), table, lengths)
    scores = query.new_full((batch, heads, table.shape[1]), -torch.inf, dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):
        used = table[row, :length].long()
        grouped = query[row].view(heads, 1, -1, dim)
        scores[row, :, :length] = _bounds(grouped, low[:, used], None if high is None else high[:, used])[:, 0]
    return scores


def _covers(lengths: torch.Tensor, pages: int, batch: int) -> bool:
    return 2 * int(lengths.sum()) >= pages * batch


def _bounds(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
    """Return the scores of all pages for queries `(H, B, G, D)`, `(H, B, N)` float32."""
    folded = query.flatten(1, 2).float()
    if high is None or high.dtype == torch.uint8:
        products = torch.bmm(folded, low.float().transpose(1, 2))
        if high is not None:
            products.baddbmm_(folded.clamp_min(0), spread_values(high).transpose(1, 2))
    else:
        signs = torch.cat([folded.clamp_max(0), folded.clamp_min(0)], dim=2)
        # Keys first: with few queries the product is twice as fast that way round.
        products = torch.bmm(_side_by_side(low, high).float(), signs.transpose(1, 2)).transpose(1, 2)
    return products.unflatten(1, query.shape[1:3]).amax(dim=2)


def _side_by_side(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return `(H, N, 2 * D)`, without a copy where both are halves of such a tensor."""
    heads, pages, dim = low.shape
    whole = low.stride() == high.stride() == (2 * dim * pages, 2 * dim, 1)
    if whole and high.data_ptr() - low.data_ptr() == dim * low.element_size() and low.dtype == high.dtype:
        return low.as_strided((heads, pages, 2 * dim), low.stride())
    return torch.cat([low, high], dim=2)


def _looked_up(scores: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return `(H, B, N)` scores of pages as `(B, H, n)` scores of table entries."""
    used = torch.arange(table.shape[1], device=table.device) < lengths[:, None]
    index = table.where(used, 0).long().expand(len(scores), -1, -1)
    return scores.gather(2, index).masked_fill_(~used, -torch.inf).transpose(0, 1)
