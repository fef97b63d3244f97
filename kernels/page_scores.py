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
    scores = query.new_full((batch, heads, table.shape[1]), -torch.inf, dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):
        used = table[row, :length].long()
        grouped = query[row].float().view(heads, -1, dim)
        least = low[:, used].float()
        if high is None:
            products = grouped @ least.transpose(1, 2)
        else:
            most = high[:, used]
            most = least + spread_values(most) if most.dtype == torch.uint8 else most.float()
            products = grouped.clamp_min(0) @ most.transpose(1, 2) + grouped.clamp_max(0) @ least.transpose(1, 2)
        scores[row, :, :length] = products.amax(dim=1)
    return scores
