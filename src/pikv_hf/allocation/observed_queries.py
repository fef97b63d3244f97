"""Queries as attention used them, after rotary embedding, norms and everything else, and what attention they pay."""

from dataclasses import dataclass

import torch
from torch import nn

from ..common.foreign_attributes import OBSERVER_ATTRIBUTE

#: Queries kept per layer, the latest ones.
RECENT = 64


@dataclass(frozen=True, slots=True)
class Observed:
    """Some queries of one attention layer.

    Attributes
    ----------
    queries : torch.Tensor
        `(B, Hq, m, D)`.
    positions : torch.Tensor
        `(m,)` int64, ascending: the column of each query's own token.
    valid : torch.Tensor or None
        `(B, m)` bool, False for queries of padding; None if there is none.
    """

    queries: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None

    def pick(self, index: torch.Tensor) -> "Observed":
        """Return the queries at `index` `(n,)`, copied."""
        valid = None if self.valid is None else self.valid[:, index]
        return Observed(self.queries[:, :, index], self.positions[index], valid)

    def __add__(self, later: "Observed") -> "Observed":
        valid = None
        if self.valid is not None or later.valid is not None:
            valid = torch.cat([self._known_valid(), later._known_valid()], dim=1)
        return Observed(
            torch.cat([self.queries, later.queries], dim=2), torch.cat([self.positions, later.positions]), valid
        )

    def _known_valid(self) -> torch.Tensor:
        if self.valid is not None:
            return self.valid
        shape = self.queries.shape[0], self.queries.shape[2]
        return torch.ones(shape, dtype=torch.bool, device=self.queries.device)


class Observer:
    """Keeps the latest queries of one attention module.

    Attributes
    ----------
    recent : Observed or None
        The latest queries.
    scale : float
        What attention multiplies logits by.
    sinks : torch.Tensor or None
        `(Hq,)` logits of attention sinks, as gpt-oss has them.
    softcap : float or None
        Where logits are capped by `softcap * tanh(logits / softcap)`.
    batch, new, seen : int
        Rows and new tokens of the last call, and tokens read so far.
    calls : int
        How often attention has run.
    """

    def __init__(self) -> None:
        self.recent: Observed | None = None
        self.scale, self.batch, self.new, self.seen, self.calls = 1.0, 0, 0, 0, 0
        self.sinks: torch.Tensor | None = None
        self.softcap: float | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Observer":
        """Return the observer of an attention module, a new one if it has none."""
        observer = getattr(module, OBSERVER_ATTRIBUTE, None)
        if not isinstance(observer, cls):
            observer = cls()
            setattr(module, OBSERVER_ATTRIBUTE, observer)
        return observer

    def __call__(
        self,
        query: torch.Tensor,
        past: int,
        valid: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None,
        softcap: float | None,
    ) -> None:
        """Note the queries `(B, Hq, Q, D)` of a call after `past` tokens; `valid` `(B, Q)` is False for padding."""
        new = query.shape[2]
        self.batch, self.new = query.shape[0], new
        self.calls += 1
        if past == 0:
            self.recent = None
        self.scale, self.sinks, self.softcap, self.seen = scale, sinks, softcap, past + new
        call = Observed(query.detach(), torch.arange(past, past + new, device=query.device), valid)
        latest = call.pick(torch.arange(max(0, new - RECENT), new, device=query.device))
        joined = latest if self.recent is None else self.recent + latest
        self.recent = joined.pick(torch.arange(len(joined.positions), device=query.device)[-RECENT:])


def attention_mass(
    observer: Observer, queries: Observed, keys: torch.Tensor, stored: torch.Tensor | None = None, causal: bool = True
) -> torch.Tensor:
    """Return the attention that observed queries pay to each key, averaged over the queries that see it.

    Parameters
    ----------
    observer : Observer
        Scale, sinks and soft cap.
    queries : Observed
        Which queries.
    keys : torch.Tensor
        `(B, H, T, D)`.
    stored : torch.Tensor, optional
        `(B, H, T)` bool, False for padding and what was evicted.
    causal : bool
        Whether key t is the token at position t, which earlier queries do not see; else all queries see all keys.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, averaged over the query heads of a KV head; 0 where nothing is stored or seen.
    """
    batch, heads, tokens, _ = keys.shape
    groups = queries.queries.shape[1] // heads
    column = torch.arange(tokens, device=keys.device)
    seen = column <= queries.positions[:, None] if causal else torch.ones_like(column <= queries.positions[:, None])
    seen = seen.expand(batch, -1, -1)
    if queries.valid is not None:
        seen = seen & queries.valid[..., None]
    mass = keys.new_empty((batch, heads, tokens), dtype=torch.float32)
    for head in range(heads):
        visible = seen if stored is None else seen & stored[:, head, None]
        own = slice(head * groups, (head + 1) * groups)
        logits = torch.matmul(queries.queries[:, own].float(), keys[:, head, None].float().transpose(-1, -2))
        logits.mul_(observer.scale)
        if observer.softcap is not None:
            logits.div_(observer.softcap).tanh_().mul_(observer.softcap)
        logits.masked_fill_(~visible[:, None], -torch.inf)
        total = logits.logsumexp(dim=-1, keepdim=True)
        if observer.sinks is not None:
            total = torch.logaddexp(total, observer.sinks[own].float().view(1, -1, 1, 1).expand_as(total))
        # A query that sees nothing, as one of padding, has no total.
        weights = logits.sub_(total.masked_fill(total == -torch.inf, 0)).exp_()
        mass[:, head] = weights.sum(dim=2).mean(dim=1) / visible.sum(dim=1).clamp_min(1)
    return mass
