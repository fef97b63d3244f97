"""Where the attention of a call went, page by page: what the kernels return, for scheduling."""

import torch

from ..pages.page_pool import PagePool

# Of the newest queries of a call, so many tell how its own tokens are attended to.
OBSERVED = 32


class AttentionMass:
    """Collects the log-sum-exps of pages during one attention call of one layer, without another pass over the keys."""

    def __init__(self) -> None:
        self._parts: list[tuple[PagePool, list[int] | None, torch.Tensor, torch.Tensor]] = []

    def add(self, pool: PagePool, rows: list[int] | None, pages: torch.Tensor, page_lse: torch.Tensor) -> None:
        """Take the log-sum-exps of pages.

        Parameters
        ----------
        pool : PagePool
            Whose pages.
        rows : list of int or None
            The R rows that read them, None for all.
        pages : torch.Tensor
            Their numbers, broadcastable to `(H, R, n)`.
        page_lse : torch.Tensor
            `(H, R, M, n)` float32, for M queries of each KV head; `-inf` where a page did not count.
        """
        self._parts.append((pool, rows, pages.expand(*page_lse.shape[:2], -1), page_lse))

    def note(self, lse: torch.Tensor) -> None:
        """Add each page's share of the attention to its statistics, as one step.

        Parameters
        ----------
        lse : torch.Tensor
            `(H, B, M)` float32, log-sum-exp over everything that the queries saw.
        """
        read = lse.new_zeros(lse.shape[1])
        shares = []
        for pool, rows, pages, page_lse in self._parts:
            total = lse if rows is None else lse[:, rows]
            # A query that saw nothing, padding for one, has no shares.
            share = (page_lse - total.unsqueeze(-1)).exp_().nan_to_num_(0.0).mean(dim=2)
            shares.append((pool, rows, pages, share))
            counted = (page_lse > -torch.inf).any(dim=2).sum(dim=2).amax(dim=0).to(read.dtype)
            if rows is None:
                read += counted
            else:
                read[rows] += counted
        heads = len(lse)
        for pool, rows, pages, share in shares:
            if (usage := pool.usage) is None:
                continue
            usage.add(pages.reshape(-1), (share / heads).reshape(-1))
            equal = 1 / (read if rows is None else read[rows]).clamp_min(1)
            # What a single head leans on is in use too.
            usage.use(pages.reshape(-1), (share >= equal[:, None]).reshape(-1))


def own_masses(
    query: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """Return how much attention the new tokens of a call get from its newest queries.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, n, D)`, the last n <= Q of the call; the last :data:`OBSERVED` are looked at.
    keys : torch.Tensor
        `(B, H, Q, D)`, the new tokens.
    bias : torch.Tensor, optional
        `(B, 1 or H, G or 1, Q, Q)` float32, added to the logits; causal without one.
    scale, softcap
        As in :func:`pikv_hf.kernels.partial_attention`.
    lse : torch.Tensor, optional
        `(B, Hq, n)` float32, log-sum-exp over everything that the queries saw, if that is more than the new tokens.

    Returns
    -------
    torch.Tensor
        `(B, H, Q)` float32, mean over query heads and queries.
    """
    batch, _, queries, dim = query.shape
    heads, new = keys.shape[1:3]
    seen_by = min(queries, OBSERVED)
    recent = query[:, :, -seen_by:].reshape(batch, heads, -1, seen_by, dim)
    masses = query.new_zeros((batch, heads, new), dtype=torch.float32)
    future = torch.ones((seen_by, new), dtype=torch.bool, device=query.device).triu_(new - seen_by + 1)
    # One KV head at a time: the logits of all would be as large as the prompt's own.
    for head in range(heads):
        own = recent[:, head].flatten(1, 2)
        logits = torch.bmm(own, keys[:, head].transpose(1, 2)).float().mul_(scale).unflatten(1, (-1, seen_by))
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is None:
            logits.masked_fill_(future, -torch.inf)
        else:
            logits += bias[:, min(head, bias.shape[1] - 1), :, -seen_by:]
        total = logits.logsumexp(dim=3) if lse is None else lse.view(batch, heads, -1, queries)[:, head, :, -seen_by:]
        masses[:, head] = logits.sub_(total.unsqueeze(-1)).exp_().nan_to_num_(0.0).mean(dim=(1, 2))
    return masses
