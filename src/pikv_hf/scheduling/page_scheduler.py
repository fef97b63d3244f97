"""The scheduler of a layer: counts what attention reads of its pages, and has some evicted when a budget is used up."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..allocation.known_recall import KnownRecall
from ..allocation.recall import SINKS
from ..config import JOINT, PiKVConfig
from ..page_table.page_table import PageTable
from ..pages.plain_pool import PlainPool
from ..pages.pool_growth import NoRoomError
from ..tiers.tiered_pool import TieredPool
from .eviction import evict_bytes, evict_for_pages, evict_packed, evict_tokens, token_count
from .growth_limit import BudgetError, GrowthLimit
from .layer_budget import LayerBudget
from .policies.registry import SchedulingPolicy, make_policy
from .shared_budget import SharedBudget
from .tier_priority import TierPriority

# Queries kept for policies that look at bounds.
RECENT_QUERIES = 8

# What is stored of a prompt before pages go to make room for the rest: a share of the budget, within limits.
PIECE_SHARE, MAX_PIECE = 32, 2048

# Pools under a budget grow by this share of their size at a time: free pages take bytes too.
BUDGET_GROWTH = 1 / 64

# Options of `pikv` where pages are evicted. A tier wants the pages of the next steps, for which a half-life of 8 was
# best; what is evicted is gone, and 64 lost the least attention (`options` in eval/results/page-traces.json).
BUDGET_OPTIONS = {"half_life": 64.0, "bound_weight": 13.0}

# Those of what is left to pages where layers decide together.
JOINT_OPTIONS = {"half_life": 64.0}

_Result = TypeVar("_Result")


class PageScheduler:
    """Evicts pages of one layer when its budget is used up.

    Parameters
    ----------
    policy : SchedulingPolicy
        Which pages go first.
    budget : LayerBudget or None
        How much may stay; None where only the tiers ask which pages go.
    sink_tokens, recent_window : int
        As in :class:`~pikv_hf.PiKVConfig`: these tokens never go.
    query_groups : int
        Query heads per KV head, for what a budget in bytes needs at least.
    jointly : bool
        Whether all layers of the cache are to decide together what each keeps.

    Attributes
    ----------
    shared : SharedBudget or None
        The layers that decide together what each keeps; the policy then only says what goes where that cannot be.
    now : int
        Attention steps so far.
    queries : torch.Tensor or None
        `(B, Hq, m, D)`, the newest ones, scaled.
    softcap, logit_sinks : float or None, torch.Tensor or None
        What capped their logits, and the logits `(Hq,)` of attention sinks beside them: the model's own, not a copy.
    recall : KnownRecall or None
        How well stored tokens would be recalled, for joint decisions.
    pages_evicted, tokens_evicted : int
        Over all sequences, shared ones once for each.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        budget: LayerBudget | None,
        sink_tokens: int,
        recent_window: int,
        query_groups: int = 1,
        jointly: bool = False,
    ) -> None:
        self.jointly = jointly
        self.policy, self.budget = policy, budget
        self.sink_tokens, self.recent_window = sink_tokens, recent_window
        self.now = 0
        self.queries: torch.Tensor | None = None
        self.softcap: float | None = None
        self.logit_sinks: torch.Tensor | None = None
        self.recall: KnownRecall | None = None
        self.query_groups = query_groups
        self.pages_evicted = self.tokens_evicted = 0
        self.shared: SharedBudget | None = None
        # Pages that attention had found in fast memory, and not, when this was last looked at.
        self._read = 0, 0

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [
            *([] if self.queries is None else [self.queries]),
            *([] if self.recall is None else self.recall.tensors()),
        ]

    def most_beside(self, pool: PlainPool, rows: int) -> int:
        """Return the most bytes that are kept beside the pages of a table of so many rows."""
        heads, dim = pool.keys.shape[0], pool.bounds_dim
        queries = RECENT_QUERIES * self.query_groups if self.remembers else 0
        first = SINKS if self.jointly else 0
        return (queries + first) * rows * heads * dim * pool.keys.element_size()

    @property
    def remembers(self) -> bool:
        """Whether it keeps the newest queries."""
        return self.policy.reads_bounds or self.jointly

    def fork(self) -> "PageScheduler":
        """Return an independent scheduler that has seen the same."""
        twin = copy.copy(self)
        twin.policy = copy.deepcopy(self.policy)
        return twin

    def select(self, table: PageTable, rows: Sequence[int], lanes: int) -> None:
        """Follow the layer to other sequences, of `lanes` rows each, before its table does.

        Raises
        ------
        BudgetError
            If the budget is too small for so many; nothing has changed then.
        """
        self._admit(table, len(rows) * lanes)
        if self.queries is not None:
            self.queries = self.queries[list(rows)]
        if self.recall is not None:
            self.recall = self.recall.pick(torch.tensor(list(rows), device=self.recall.first.device))

    def crop(self, columns: int) -> None:
        """Forget how well later tokens than these would be recalled."""
        if self.recall is not None:
            self.recall = self.recall.cropped(columns) if columns else None

    def forget(self) -> None:
        """Forget queries and tokens; the counts stay."""
        self.queries = self.recall = None

    # Statistics

    def begin_step(self, table: PageTable) -> None:
        """Count a step of attention; forks, which share pages, share the count."""
        self.prepare(table)
        known = table.pools.plain.usage
        assert known is not None
        self.now = max(self.now, known.now) + 1
        for pool in table.pools.by_id().values():
            if pool.usage is not None:
                pool.usage.begin_step(self.now)
            if isinstance(pool, TieredPool) and pool.frames.priority is None:
                pool.frames.priority = TierPriority(self, pool)
        if table.pools.tiers is not None:
            counted = table.pools.tiers.counters
            self.policy.count_reads(counted.hits - self._read[0], counted.misses - self._read[1])
            self._read = counted.hits, counted.misses

    def prepare(self, table: PageTable) -> None:
        """Let the pools of a table keep statistics, and grow no further than the budget allows."""
        pages = table.pools
        if pages.plain.usage is None:
            pages.keep_usage(self.now)
            if self.budget is not None:
                pages.plain.growth = min(pages.plain.growth, BUDGET_GROWTH)
            if self.policy.reads_bounds:
                pages.keep_bounds()
        self._admit(table, len(table.rows))

    def _admit(self, table: PageTable, rows: int) -> None:
        pages = table.pools
        if self.budget is not None and self.budget.total_bytes is not None and not self.budget.per_shard:
            if pages.plain.growth_limit is None:
                pages.limit_growth(GrowthLimit(pages, self.budget))
            assert isinstance(pages.plain.growth_limit, GrowthLimit)
            pages.plain.growth_limit.admit(self, rows)

    def remember_queries(
        self, query: torch.Tensor, scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> None:
        """Remember the newest queries `(B, Hq, Q, D)` for policies that look at bounds, and for joint decisions.

        These want to know what caps their logits, too, and attention sinks `(Hq,)`.
        """
        if self.jointly:
            self.softcap, self.logit_sinks = softcap, None if sinks is None else sinks.detach()
        if self.remembers:
            newest = query[:, :, -RECENT_QUERIES:].detach() * scale
            known = self.queries
            if known is not None and (len(known), known.shape[-1]) == (len(newest), newest.shape[-1]):
                newest = torch.cat([known, newest], dim=2)[:, :, -RECENT_QUERIES:]
            self.queries = newest.contiguous()

    def credit(self, table: PageTable, masses: torch.Tensor, start: int) -> None:
        """Add how tokens just stored were attended to in their own call to the statistics of their pages.

        Parameters
        ----------
        table : PageTable
            R rows.
        masses : torch.Tensor
            `(R, n)` float32, of the tokens at positions `start..start + n - 1`.
        """
        done: set[int] = set()
        for row, sequence in enumerate(table.rows):
            if id(sequence) in done:
                continue
            done.add(id(sequence))
            for pool_id, pool in table.pools.by_id().items():
                index = pool.index(sequence.pages(pool_id))
                if pool.usage is None or not len(index):
                    continue
                offsets = pool.positions[index].long() - start
                inside = (offsets >= 0) & (offsets < masses.shape[1])
                picked = masses[row][offsets.clamp(0, masses.shape[1] - 1)].masked_fill(~inside, 0)
                pool.usage.add(index, picked.sum(dim=1))
                pool.usage.attended(index)

    # Budgets

    def piece(self, seen: int, page_size: int, bytes_per_token: int) -> int:
        """Return how many tokens of a prompt are stored at a time."""
        if self.budget is None:
            return 1 << 60
        tokens = self.budget.tokens_of(seen, 1)
        if tokens is None:
            assert self.budget.total_bytes is not None
            tokens = self.budget.total_bytes // max(1, bytes_per_token)
        return max(1, min(tokens // PIECE_SHARE, MAX_PIECE) // page_size) * page_size

    def with_room(self, table: PageTable, seen: int, work: Callable[[], _Result]) -> _Result:
        """Do what may need new pages; where the budget has none left, evict and try again.

        Raises
        ------
        BudgetError
            If nothing more can be evicted; what the work undoes by itself is undone.
        """
        while True:
            try:
                return work()
            except NoRoomError as error:
                self.make_room(table, seen, error)

    def make_room(self, table: PageTable, seen: int, error: NoRoomError) -> None:
        """Evict what a pool of the table needs to go on.

        Raises
        ------
        BudgetError
            If nothing more can be evicted.
        """
        if evict_for_pages(self, table, error.pool, error.pages, seen):
            return
        wanted = error.pages * error.pool.full_page_bytes
        if self.shared is None or self.shared.evict_elsewhere(self, -1, wanted) > 0:
            given = "the budget" if self.budget is None else f"budget={self.budget.asked_for!r}"
            raise BudgetError(
                f"{given} leaves no room for {error.pages} more pages of {error.pool.page_size} tokens, and all that "
                f"is left are sinks, the last {self.recent_window} tokens and pages that other caches share, which may "
                "not be evicted; a larger budget or a smaller recent_window= has room"
            ) from None

    def _shrink(self, table: PageTable, seen: int) -> bool:
        """Evict until the pools are within a budget in bytes: a table that replaces another was not made within it."""
        assert self.budget is not None
        growth_limit, shrunk = table.pools.plain.growth_limit, False
        while growth_limit is not None and (over := -growth_limit()) > 0:
            if not evict_bytes(self, table, list(table.pools.by_id()), over, seen):
                raise BudgetError(
                    f"a layer stores {over:,} bytes more than budget={self.budget.asked_for!r} leaves it, none of "
                    "which may be evicted"
                )
            shrunk = True
        return shrunk

    def enforce(self, table: PageTable, lanes: int, seen: int, headroom: int = 0) -> bool:
        """Evict until every sequence is within a budget in tokens, or the pools are within one in bytes.

        Parameters
        ----------
        table : PageTable
            What the layer stores.
        lanes : int
            Rows of the table per sequence.
        seen : int
            Columns of the layer.
        headroom : int
            Tokens of each row that may still come before this is called again.

        Returns
        -------
        bool
            Whether anything went.
        """
        if self.budget is None:
            return False
        limit = self.budget.tokens_of(seen, table.num_shards)
        if self.shared is not None and self.shared.deciding:
            return False
        if limit is None and not self.budget.per_shard:
            return self._shrink(table, seen)
        if self.shared is not None:
            return self._keep_share(table, lanes, seen)
        done: set[tuple[int, ...]] = set()
        evicted = False
        for first in range(0, len(table.rows), lanes):
            rows = table.rows[first : first + lanes]
            if (key := tuple(map(id, rows))) in done:
                continue
            done.add(key)
            if self.budget.per_shard:
                most = limit if limit is not None else self._shard_tokens(table, lanes)
                for shard in range(table.num_shards):
                    excess = token_count(table, rows, shard) - most * len(rows)
                    evicted |= evict_tokens(self, table, rows, excess, seen, shard)
            else:
                assert limit is not None
                # The window is in every part, and counts once; of what is left each has its share.
                window = sum(int(table.plain.count[row.window].sum()) for row in rows)
                allowed = int(((limit - headroom) * lanes - window) * self.budget.part_share)
                excess = token_count(table, rows) - window - allowed
                evicted |= evict_tokens(self, table, rows, excess, seen)
        return evicted

    def _keep_share(self, table: PageTable, lanes: int, seen: int) -> bool:
        """Evict pages until the sequences are within a budget that the layers share."""
        assert self.shared is not None
        assert self.budget is not None
        evicted = False
        for row in range(len(table.rows) // lanes):
            over = self.shared.over(self, table, row)
            if over <= 0:
                continue
            evicted = True
            missing = evict_packed(self, table, table.rows[row * lanes : (row + 1) * lanes], over, seen)
            if missing and (missing := self.shared.evict_elsewhere(self, row, missing)):
                raise BudgetError(
                    f"{missing:,} bytes too many are stored under budget={self.budget.asked_for!r}, and none of them "
                    "may be evicted"
                )
        return evicted

    def _shard_tokens(self, table: PageTable, lanes: int) -> int:
        """Return a shard's bytes in tokens of one sequence, as they came: packed ones are smaller."""
        assert self.budget is not None
        assert self.budget.total_bytes is not None
        per_page = table.plain.full_page_bytes * lanes * (len(table.rows) // lanes)
        return self.budget.total_bytes // per_page * table.plain.page_size


def scheduler_name(config: PiKVConfig, may_decide_jointly: bool = True) -> str | None:
    """Return what says what goes first, None if nothing ever has to go.

    By default layers decide together what a budget keeps, unless an option, or what `may_decide_jointly` stands for,
    leaves no room for that: then pages go by :class:`~pikv_hf.scheduling.policies.pikv.PiKV`. Where there are only
    tiers, those used last stay in the fast ones.
    """
    if config.budget is None and config.tiers is None:
        return None
    if config.scheduler is not None:
        return config.scheduler
    if config.budget is None:
        return "lru"
    return JOINT if may_decide_jointly and config.joint_obstacle() is None else "pikv"


def make_scheduler(
    config: PiKVConfig,
    layers: int,
    sliding_tokens: int,
    parts: int = 1,
    part_share: float = 1.0,
    query_groups: int = 1,
    may_decide_jointly: bool = True,
) -> PageScheduler | None:
    """Return the scheduler of one part of a paged layer, None if no page ever has to go; see :func:`scheduler_name`.

    Raises
    ------
    ValueError
        See :meth:`LayerBudget.of`.
    """
    budget = LayerBudget.of(config, layers, sliding_tokens, parts, part_share)
    name = scheduler_name(config, may_decide_jointly)
    if name is None:
        return None
    options = BUDGET_OPTIONS if name == "pikv" and budget is not None else {}
    # Of a joint decision the policy is what is left to pages: it keeps no bounds, which take bytes.
    options = JOINT_OPTIONS if name == JOINT else options
    policy = make_policy("pikv" if name == JOINT else name, **options)
    return PageScheduler(policy, budget, config.sink_tokens, config.recent_window, query_groups, name == JOINT)
