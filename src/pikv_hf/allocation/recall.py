"""How well a text that is read again would be recalled: the attention its own queries, moved behind it, pay to it.

What a token of a context is worth shows when the context is asked about. KVzip (arXiv 2505.23416) has the model repeat
it, in a second pass, and takes the most attention that a token gets then. Here the queries of the first pass are used
once more, as if they stood behind the text, looking at the tokens around their own place, later ones too, which they
were not allowed to see. Nothing is read twice. `docs/presses.md` has the figures of both.

A query that is moved on meets a key as the query itself meets the key moved back, and there are fewer keys to move.
"""

import torch
from torch.nn.functional import pad

#: A query looks at the block of tokens that it is in and at the next: what it recalls is its own token or one soon
#: after, so the cost grows with the tokens and not with their square.
BLOCK = 32

#: First tokens that take the attention of heads which find nothing.
SINKS = 4

#: Logits at a time, so that they stay in a processor's cache between the passes over them.
LOGITS_AT_ONCE = 1 << 18


def recall_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    moved: torch.Tensor,
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
    keys : torch.Tensor
        `(B, H, T, D)`.
    moved : torch.Tensor
        `(B, H, T, D)`, the same moved away from the queries, see :class:`~pikv_hf.allocation.query_turn.Turn`.
    scale : float
        What attention multiplies logits by.
    valid : torch.Tensor, optional
        `(B, T)` bool, False for padding.
    sinks : torch.Tensor, optional
        `(Hq,)` logits of attention sinks, as gpt-oss has them.
    softcap : float, optional
        Where logits are capped by `softcap * tanh(logits / softcap)`.
    first : torch.Tensor, optional
        `(B, H, S, D)`, the first keys of the sequence, moved away, if these T are not its beginning.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, in [0, 1], the most over the query heads of a KV head; 0 for padding.
    """
    batch, heads, tokens, _ = keys.shape
    mass = torch.zeros((batch, heads, tokens), dtype=torch.float32, device=keys.device)
    groups = queries.shape[1] // heads
    for row in range(batch):
        real: slice | torch.Tensor = slice(None)
        if valid is not None:
            if not bool(valid[row].any()):
                continue
            real = valid[row].nonzero().squeeze(1)
        for head in range(heads):
            own = slice(head * groups, (head + 1) * groups)
            near, far = (part[row, head][real].float() * scale for part in (keys, moved))
            start = far[:SINKS] if first is None else first[row, head].float() * scale
            columns = _columns(near, far, start)
            bias = _bias(tokens=len(near), starts=len(start), repeated=first is None, device=keys.device)
            logits = None if sinks is None else sinks[own].float()
            mass[row, head, real] = _of_head(queries[row, own][:, real], columns, bias, softcap, logits)
    return mass


def _columns(near: torch.Tensor, far: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return `(blocks, D, 4 BLOCK + S)`, what the queries of each block are multiplied by.

    Moved keys of the block and of the next, keys in their own place of the block before and of the block, the first
    keys of the text.
    """
    tokens, dim = near.shape
    blocks = -(-tokens // BLOCK)
    near, far = (pad(part, (0, 0, 0, blocks * BLOCK - tokens)).view(blocks, BLOCK, dim) for part in (near, far))
    before, after = pad(near[:-1], (0, 0, 0, 0, 1, 0)), pad(far[1:], (0, 0, 0, 0, 0, 1))
    parts = [far, after, before, near, start.expand(blocks, -1, -1)]
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


def _bias(tokens: int, starts: int, repeated: bool, device: torch.device) -> torch.Tensor:
    """Return `(blocks, 1, BLOCK, 4 BLOCK + S)`, -inf where a query does not look.

    `repeated` says that the first keys are the first block's own, which count once.
    """
    blocks = -(-tokens // BLOCK)
    place = torch.arange(BLOCK, device=device)
    bias = torch.zeros((blocks, 1, BLOCK, 4 * BLOCK + starts), device=device)
    bias[..., 3 * BLOCK : 4 * BLOCK].masked_fill_(place > place[:, None], -torch.inf)
    bias[0, ..., 2 * BLOCK : 3 * BLOCK] = -torch.inf
    column = torch.arange(blocks * BLOCK + BLOCK, device=device)
    missing = (column >= tokens).unfold(0, 2 * BLOCK, BLOCK)
    bias[..., : 2 * BLOCK].masked_fill_(missing[:, None, None], -torch.inf)
    if repeated:
        bias[0, ..., 4 * BLOCK :] = -torch.inf
    return bias


def _of_head(
    queries: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return `(T,)` for queries `(G, T, D)` of one KV head, without padding."""
    groups, tokens, dim = queries.shape
    blocks, _, width = columns.shape
    most = torch.empty((blocks, 2 * BLOCK), device=queries.device)
    at_once = max(1, LOGITS_AT_ONCE // (groups * BLOCK * width))
    for begin in range(0, blocks, at_once):
        part = slice(begin, min(begin + at_once, blocks))
        count = part.stop - begin
        asked = queries[:, begin * BLOCK : part.stop * BLOCK].float()
        if missing := count * BLOCK - asked.shape[1]:
            asked = pad(asked, (0, 0, 0, missing))
        asked = asked.unflatten(1, (count, BLOCK)).transpose(0, 1)
        logits = torch.bmm(asked.reshape(count, groups * BLOCK, dim), columns[part]).view(count, groups, BLOCK, width)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        logits += bias[part]
        if sinks is None:
            shares = logits.softmax(-1)
        else:
            total = torch.logaddexp(logits.logsumexp(-1), sinks[:, None])
            shares = logits.sub_(total.unsqueeze(-1)).exp_()
        if missing:
            # What fills up the last block asks nothing.
            shares[-1, :, BLOCK - missing :] = 0
        most[part] = shares.view(count, groups * BLOCK, width)[..., : 2 * BLOCK].amax(1)
    own, following = most.split(BLOCK, dim=1)
    own[1:] = torch.maximum(own[1:], following[:-1])
    return own.flatten()[:tokens]
