"""Queries as attention used them, after rotary embedding, norms and everything else, and what attention they pay."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..common.foreign_attributes import OBSERVER_ATTRIBUTE
from .query_turn import Turn
from .recall import SINKS, recall_mass

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


@dataclass(frozen=True, slots=True)
class RunningTurn:
    """How queries of a running call are moved behind the call's tokens.

    Attributes
    ----------
    turn : Turn or None
        None if that is not known.
    cache : weakref.ref or None
        What the call writes to, None if nothing.
    """

    turn: Turn | None
    cache: "weakref.ref[Any] | None"


@dataclass(frozen=True, slots=True)
class ObservedCall:
    """What an observer is shown of a call of attention.

    Attributes
    ----------
    query : torch.Tensor
        `(B, Hq, Q, D)` of the new tokens.
    past : int
        Tokens before them.
    valid : torch.Tensor or None
        `(B, Q)` bool, False for padding.
    scale : float
        What attention multiplies logits by.
    sinks : torch.Tensor or None
        `(Hq,)` logits of attention sinks.
    softcap : float or None
        Where logits are capped by `softcap * tanh(logits / softcap)`.
    keys : torch.Tensor or None
        Those of the new tokens, `(B, H, Q, D)`.
    running : RunningTurn or None
        How queries are moved behind them; with the keys it tells what would be recalled.
    """

    query: torch.Tensor
    past: int
    valid: torch.Tensor | None
    scale: float
    sinks: torch.Tensor | None
    softcap: float | None
    keys: torch.Tensor | None = None
    running: RunningTurn | None = None

    @property
    def cache(self) -> Any:
        """What the call writes to, None if nothing or not known."""
        return None if self.running is None or self.running.cache is None else self.running.cache()


class Observer:
    """Keeps the latest queries of one attention module, and how well its tokens would be recalled.

    Attributes
    ----------
    recent : Observed or None
        The latest queries.
    recalled : torch.Tensor or None
        `(B, H, T)` float32 of :func:`~pikv_hf.allocation.recall.recall_mass`, NaN for tokens of which it is not
        known, as of those that came one by one, and shorter where these are the last; None where
        it is not known how queries are moved, or the tokens before the last call were not observed.
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
    recalls : bool
        Whether anybody wants to know what is recalled, which takes some time.
    """

    def __init__(self, recalls: bool = False) -> None:
        self.recalls = recalls
        self.recent: Observed | None = None
        self.recalled: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        # The cache that recall is known of, and the one that was written to last.
        self._cache: Callable[[], Any] = lambda: None
        self._heard: Callable[[], Any] = lambda: None
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

    def __call__(self, call: ObservedCall) -> None:
        """Note the queries of a call, and how well its tokens would be recalled."""
        query, past, new, cache = call.query, call.past, call.query.shape[2], call.cache
        self.calls += 1
        if past == 0 or len(query) != self.batch or (cache is not None and cache is not self._heard()):
            self.recent = None
        self._heard = (lambda: None) if cache is None else weakref.ref(cache)
        if past < self.seen:
            # Which tokens have gone since is not known, nor what the others are now called.
            self._cache = lambda: None
        self.scale, self.sinks, self.softcap = call.scale, call.sinks, call.softcap
        self.batch, self.new, self.seen = query.shape[0], new, past + new
        queries = Observed(query.detach(), torch.arange(past, past + new, device=query.device), call.valid)
        latest = queries.pick(torch.arange(max(0, new - RECENT), new, device=query.device))
        joined = latest if self.recent is None else self.recent + latest
        self.recent = joined.pick(torch.arange(len(joined.positions), device=query.device)[-RECENT:])
        if self.recalls:
            with torch.autocast(query.device.type, enabled=False):
                self._recall(call)

    @property
    def first(self) -> torch.Tensor | None:
        """The first keys of each sequence `(B, H, S, D)`, once it is known how well its tokens would be recalled."""
        return self._first

    def resume(self, recalled: torch.Tensor, first: torch.Tensor, cache: Any) -> None:
        """Go on from what is known of the tokens that a cache has read: `(B, H, T)` as :attr:`recalled`, first keys."""
        self.recalled, self._first, self._cache = recalled, first, weakref.ref(cache, self._forget)

    def recall_of(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Return how well tokens with keys `(B, H, T, D)` would be recalled, NaN where unknown; None if of all."""
        if self.recalled is None or self.recalled.shape[:2] != keys.shape[:2] or keys.shape[2] != self.seen:
            return None
        return pad(self.recalled, (0, keys.shape[2] - self.recalled.shape[2]), value=torch.nan)

    @torch.compiler.disable
    def _recall(self, call: ObservedCall) -> None:
        query, past, cache, running, before = call.query.detach(), call.past, call.cache, call.running, self.recalled
        if past == 0 or before is None or cache is None or self._cache() is not cache or len(before) != len(query):
            before = self._first = None
        self.recalled = None
        if running is None or cache is None or call.keys is None or (past and before is None):
            return
        if query.shape[2] > 1 and running.turn is not None:
            keys, sinks = call.keys.detach(), None if self.sinks is None else self.sinks.detach()
            back = running.turn.back()
            first = None if self._first is None else back(self._first)
            given = query, keys, back(keys), self.scale
            new = recall_mass(*given, valid=call.valid, sinks=sinks, softcap=self.softcap, first=first)
            if self._first is None:
                self._first = _first_keys(keys, call.valid)
            if before is not None:
                new = torch.cat([pad(before, (0, past - before.shape[2]), value=torch.nan), new], dim=2)
        elif query.shape[2] == 1 and before is not None:
            # What follows a single token is not known yet.
            new = before
        else:
            return
        # What is known of a cache goes with it: nobody may ever call again.
        self.recalled, self._cache = new, weakref.ref(cache, self._forget)

    def _forget(self, cache: Any) -> None:
        if self._cache is cache:
            self.recalled = self._first = None


def _first_keys(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return the first keys of each sequence `(B, H, S, D)` that are no padding, None if one has none yet."""
    if valid is None:
        return keys[:, :, :SINKS].clone()
    if not bool(valid.any(dim=1).all()):
        return None
    start = valid.long().argmax(dim=1)
    index = (start[:, None] + torch.arange(SINKS, device=keys.device)).clamp(max=keys.shape[2] - 1)
    return keys.gather(2, index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))


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
