"""Evicting pages of a table in the order of a policy: until so many tokens, pages or bytes are gone."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from ..kernels.page_scores import page_scores
from ..page_table.page_table import PageTable
from ..page_table.sequence_pages import SequencePages
from ..pages.page_pool import PagePool
from ..pages.pool_id import PoolId
from ..pages.types import PageIds
from .eviction_candidates import EvictionCandidates, PagesOfSequence
from .growth_limit import BudgetError
from .policies.registry import SchedulingPolicy, leaving


class EvictionRules(Protocol):
    """What says which pages go first, and which never; it counts what went.

    Attributes
    ----------
    policy : SchedulingPolicy
        The page with the lowest priority goes first.
    sink_tokens, recent_window : int
        Pages with any of the first and of the last tokens of a sequence never go.
    now : int
        Attention steps so far.
    queries : torch.Tensor or None
        `(B, Hq, m, D)` scaled newest queries, for policies that read bounds of their logits.
    pages_evicted, tokens_evicted : int
        Over all sequences, shared ones once for each.
    """

    policy: SchedulingPolicy
    sink_tokens: int
    recent_window: int
    now: int
    queries: torch.Tensor | None
    pages_evicted: int
    tokens_evicted: int


def evict_tokens(
    rules: EvictionRules,
    table: PageTable,
    rows: Sequence[SequencePages],
    tokens: int,
    seen: int,
    shard: int | None = None,
) -> bool:
    """Evict pages of some rows, of one shard or of all, until `tokens` tokens are gone; return whether any went.

    Raises
    ------
    BudgetError
        If too few of all shards may go. Of a single shard as many go as may.
    """
    if tokens <= 0:
        return False
    left = tokens
    sources = [PagesOfSequence(row, pool, lane) for lane, row in enumerate(rows) for pool in table.pools.by_id()]
    for candidates in _candidates(rules, table, sources, seen, shard):
        going = leaving(rules.policy, candidates.stats, left)
        _evict(rules, table, candidates, going)
        left -= int(candidates.stats.tokens[going].sum())
        if left <= 0:
            return True
    if shard is None:
        raise BudgetError(f"{left} tokens too many are stored, and none of them may be evicted")
    return left < tokens


def evict_packed(rules: EvictionRules, table: PageTable, rows: Sequence[SequencePages], nbytes: int, seen: int) -> int:
    """Evict pages of some rows until the tokens that are gone took so many bytes; return how many are missing.

    A token takes its part of a page, as :func:`row_bytes` has it.
    """
    sources = [PagesOfSequence(row, pool, lane) for lane, row in enumerate(rows) for pool in table.pools.by_id()]
    pools, left = table.pools.by_id(), nbytes
    for candidates in _candidates(rules, table, sources, seen):
        if left <= 0:
            break
        going = leaving(rules.policy, candidates.stats, int(candidates.stats.tokens.sum()))
        rates = np.array([token_bytes(pools[source.pool_id]) for source in sources])
        sizes = candidates.stats.tokens[going] * rates[candidates.of_source[going]]
        going = going[: int(np.searchsorted(sizes.cumsum(), left)) + 1]
        _evict(rules, table, candidates, going)
        left -= int(sizes[: len(going)].sum())
    return max(0, left)


def token_bytes(pool: PagePool) -> float:
    """Return the bytes of a token in the pages of a pool, its keys and values alone."""
    return pool.page_bytes / pool.page_size


def row_bytes(table: PageTable, lanes: int) -> np.ndarray:
    """Return the bytes of the keys and values of each sequence, `(B,)` float64, those that sequences share for each."""
    totals = np.zeros(len(table.rows))
    for pool_id, pool in table.pools.by_id().items():
        totals += np.array([pool.count[row.pages(pool_id)].sum() for row in table.rows]) * token_bytes(pool)
    return totals.reshape(-1, lanes).sum(axis=1)


def evict_for_pages(rules: EvictionRules, table: PageTable, pool: PagePool, pages: int, seen: int) -> bool:
    """Evict until a pool has so many more free pages, of its own if it has any, else of the others."""
    wanted, pools = pool.allocator.free_pages + pages, table.pools.by_id()
    # A pool that was to be the first of its codec is gone again.
    own = [pool_id for pool_id, each in pools.items() if each is pool]
    if any(pool.allocator.free_pages >= wanted for _ in _one_by_one(rules, table, own, seen)):
        return True
    short = (wanted - pool.allocator.free_pages) * pool.full_page_bytes
    return evict_bytes(rules, table, [pool_id for pool_id in pools if pool_id not in own], short, seen)


def evict_bytes(rules: EvictionRules, table: PageTable, pool_ids: Sequence[PoolId], wanted: int, seen: int) -> bool:
    """Evict pages of some pools until so many bytes are free, and give them back; return whether any were."""
    freed = 0
    for size in _one_by_one(rules, table, pool_ids, seen):
        freed += size
        if freed >= wanted:
            break
    before = table.pools.nbytes
    for pool_id in pool_ids:
        table.pools.compact(pool_id)
    return table.pools.nbytes < before


def _one_by_one(rules: EvictionRules, table: PageTable, pool_ids: Sequence[PoolId], seen: int) -> Iterator[int]:
    """Evict page after page of some pools, wherever they are held; yield the bytes that each frees."""
    pools = table.pools.by_id()
    distinct = table.sequences()
    sources = [
        PagesOfSequence(sequence, pool_id, lane) for lane, sequence in enumerate(distinct) for pool_id in pool_ids
    ]
    holders = {pool_id: _holders(table, pool_id) for pool_id in pool_ids}
    for candidates in _candidates(rules, table, sources, seen):
        # What somebody else holds too would be lost without making room.
        frees = np.zeros(len(candidates.stats), dtype=np.bool_)
        for source, which in candidates.by_source():
            ids = candidates.pages[which]
            frees[which] = holders[source.pool_id][ids] == pools[source.pool_id].allocator.refcount[ids]
        candidates = candidates.pick(frees)
        for page in leaving(rules.policy, candidates.stats, int(candidates.stats.tokens.sum())):
            pool = pools[candidates.sources[candidates.of_source[page]].pool_id]
            _evict(rules, table, candidates, np.array([page]))
            yield pool.full_page_bytes if pool.allocator.refcount[candidates.pages[page]] == 0 else 0


def _candidates(
    rules: EvictionRules,
    table: PageTable,
    sources: Sequence[PagesOfSequence],
    seen: int,
    shard: int | None = None,
) -> Iterator[EvictionCandidates]:
    """Yield what may go: full pages, then, if these are not enough, those that are not full."""
    recent = seen - rules.recent_window
    for is_open in (False, True):
        candidates = EvictionCandidates.of(table, sources, rules.now, is_open, shard)
        candidates = candidates.pick((candidates.oldest >= rules.sink_tokens) & (candidates.stats.newest < recent))
        # A layer that begins to store latents expanded has queries of another width until the next step.
        wanted = rules.policy.reads_bounds and rules.queries is not None
        fits = wanted and rules.queries.shape[-1] == table.plain.bounds_dim  # type: ignore[union-attr]
        if fits and rules.queries is not None and len(candidates.stats):
            candidates = candidates.with_bounds(_logit_bounds(rules.queries, table, candidates))
        yield candidates


def _logit_bounds(queries: torch.Tensor, table: PageTable, candidates: EvictionCandidates) -> np.ndarray:
    """Return upper bounds of the logits of recent queries for pages, `(n,)` float64."""
    bounds = np.full(len(candidates.stats), -np.inf)
    lanes = len(table.rows) // len(queries)
    heads = table.plain.keys.shape[0]
    # (rows, H, queries of a KV head, D): the bound of a page is that over all of them.
    of_row = queries.flatten(1, 2).unflatten(1, (lanes * heads, -1))
    of_row = of_row.reshape(len(table.rows), heads, -1, queries.shape[-1])
    rows = {id(sequence): row for row, sequence in reversed(list(enumerate(table.rows)))}
    for source, which in candidates.by_source():
        pool = table.pools.by_id()[source.pool_id]
        ids = candidates.pages[which]
        low, high = pool.key_bounds(ids)
        entries = pool.index(ids)[None].int()
        length = torch.tensor([len(ids)], dtype=torch.int32, device=pool.device)
        query = of_row[rows[id(source.sequence)]].flatten(0, 1)[None]
        scores = page_scores(query, low, high, entries, length)
        bounds[which] = scores[0].amax(dim=0).cpu().numpy()
    return bounds


def _evict(rules: EvictionRules, table: PageTable, candidates: EvictionCandidates, which: PageIds) -> None:
    """Take the pages at these indices from their sequences."""
    for number in np.unique(candidates.of_source[which]):
        source = candidates.sources[number]
        table.drop_pages(
            source.sequence, source.pool_id, candidates.pages[which[candidates.of_source[which] == number]]
        )
    rules.pages_evicted += len(which)
    rules.tokens_evicted += int(candidates.stats.tokens[which].sum())


def token_count(table: PageTable, rows: Sequence[SequencePages], shard: int | None = None) -> int:
    """Return the tokens that rows hold, those that they share counted for each, in one shard or everywhere."""
    total = 0
    for pool_id, pool in table.pools.by_id().items():
        for row in rows:
            ids = row.pages(pool_id)
            total += int(pool.count[ids if shard is None else ids[pool.shard[ids] == shard]].sum())
    return total


def _holders(table: PageTable, pool_id: PoolId) -> np.ndarray:
    """Return how many sequences of a table hold each page of a pool, `(N,)`."""
    pages = [sequence.pages(pool_id) for sequence in table.sequences()]
    return np.bincount(np.concatenate(pages), minlength=table.pools.by_id()[pool_id].capacity)
