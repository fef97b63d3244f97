"""How well a text that is read again would be recalled: the attention its own queries, moved behind it, pay to it.

What a token of a context is worth shows when the context is asked about. KVzip (arXiv 2505.23416) has the model repeat
it, in a second pass, and takes the most attention that a token gets then. Here the queries of the first pass are used
once more, as if they stood behind the text: turned by its length, looking at the tokens around their own place, later
ones too, which they were not allowed to see. Nothing is read twice. `docs/presses.md` has the figures of both.
"""

import torch
from torch.nn.functional import pad

#: A query looks at the block of tokens that it is in and at those before and after: what it recalls is near its own
#: place, so the cost grows with the tokens and not with their square.
BLOCK = 64

#: First tokens that take the attention of heads which find nothing.
SINKS = 4


def recall_mass(
    queries: torch.Tensor,
    turned: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    valid: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the most attention that a text's own queries, moved behind it, would pay to each of its tokens.

    A query competes for attention with what it saw in its own place, which would be repeated too: keys of its own block
    and of the one before, up to itself.

    Parameters
    ----------
    queries : torch.Tensor
        `(B, Hq, T, D)` as attention used them.
    turned : torch.Tensor
        The same moved behind the text, see :class:`~pikv_hf.allocation.query_turn.Turn`.
    keys : torch.Tensor
        `(B, H, T, D)`.
    scale : float
        What attention multiplies logits by.
    valid : torch.Tensor, optional
        `(B, T)` bool, False for padding.
    sinks : torch.Tensor, optional
        `(Hq,)` logits of attention sinks, as gpt-oss has them.
    softcap : float, optional
        Where logits are capped by `softcap * tanh(logits / softcap)`.
    first : torch.Tensor, optional
        `(B, H, S, D)`, the first keys of the sequence, if these T are not its beginning.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, in [0, 1], the most over the query heads of a KV head; 0 for padding.
    """
    batch, heads, tokens, _ = keys.shape
    real = torch.ones((batch, tokens), dtype=torch.bool, device=keys.device) if valid is None else valid
    mass = torch.zeros((batch, heads, tokens), dtype=torch.float32, device=keys.device)
    groups = queries.shape[1] // heads
    for row in range(batch):
        columns = real[row].nonzero().squeeze(1)
        if not len(columns):
            continue
        for head in range(heads):
            own = slice(head * groups, (head + 1) * groups)
            at = queries[row, own][:, columns].float(), turned[row, own][:, columns].float()
            start = None if first is None else first[row, head].float()
            logits = None if sinks is None else sinks[own].float()
            mass[row, head, columns] = _of_head(*at, keys[row, head, columns].float(), scale, softcap, logits, start)
    return mass


def _of_head(
    queries: torch.Tensor,
    turned: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    first: torch.Tensor | None,
) -> torch.Tensor:
    """Return `(T,)` for queries `(G, T, D)` and keys `(T, D)` of one KV head, without padding."""
    tokens = keys.shape[0]
    blocks = -(-tokens // BLOCK)
    missing = blocks * BLOCK - tokens

    def capped(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.mul_(scale)
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    asked, moved = (pad(part, (0, 0, 0, missing)).unflatten(1, (blocks, BLOCK)) for part in (queries, turned))
    around = pad(keys, (0, 0, BLOCK, BLOCK + missing)).unfold(0, 3 * BLOCK, BLOCK)
    near = torch.arange(-BLOCK, 2 * BLOCK, device=keys.device)
    column = torch.arange(blocks, device=keys.device)[:, None] * BLOCK + near
    outside = (column < 0) | (column >= tokens)
    recalled = capped(moved @ around).masked_fill_(outside[:, None], -torch.inf)
    later = near[: 2 * BLOCK] > near[BLOCK : 2 * BLOCK, None]
    repeated = capped(asked @ around[..., : 2 * BLOCK])
    repeated.masked_fill_(outside[:, None, : 2 * BLOCK] | later, -torch.inf)
    total = torch.logaddexp(recalled.logsumexp(-1), repeated.logsumexp(-1))
    start = keys[:SINKS] if first is None else first
    at_first = capped(moved @ start.T)
    if first is None:
        # Those around a query's own place count once.
        counted = column[:, :1] <= torch.arange(len(start), device=keys.device)
        at_first.masked_fill_(counted[:, None], -torch.inf)
    total = torch.logaddexp(total, at_first.logsumexp(-1))
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None, None])
    # What fills up the last block asks nothing.
    total = total.masked_fill(column[:, BLOCK : 2 * BLOCK] >= tokens, torch.inf)
    most = recalled.sub_(total.unsqueeze(-1)).exp_().amax(dim=(0, 2))
    return keys.new_zeros(tokens).scatter_reduce_(0, column[~outside], most[~outside], "amax")
