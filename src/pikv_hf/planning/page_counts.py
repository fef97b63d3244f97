"""Where the tokens of a cache are: pages of the window, begun and full pages of the shards, and room for more.

Counts follow what `page_table.sequence_writer` takes and `pages` allocates.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pikv_hf.config import PiKVConfig
from pikv_hf.pages.plain_pool import PLAIN_GROWTH
from pikv_hf.pages.pool_growth import MIN_GROWTH, kept_free
from pikv_hf.scheduling.page_scheduler import BUDGET_GROWTH

from .cache_contents import CacheContents
from .capacity import expected_pages, uniform_loads
from .distributions import poisson_cdf
from .model_shape import LayerShape


@dataclasses.dataclass(frozen=True, slots=True)
class PageCounts:
    """The pages of one row in one layer, as expected.

    Attributes
    ----------
    window, open, full : float
        Pages of sinks and recent window; partly filled pages of shards; full ones.
    tokens : int
        Tokens outside of the window.
    """

    window: float
    open: float
    full: float
    tokens: int


def page_counts(
    tokens: int, options: PiKVConfig, loads: Sequence[float], experts: int = 0, share: float = 1.0
) -> PageCounts:
    """Return where the tokens of one row are, as `SequenceWriter` divides them.

    Parameters
    ----------
    tokens : int
        Stored tokens of the row.
    options : PiKVConfig
        Page size, window, sinks, placement.
    loads : sequence of float
        Shares of the tokens by shard; they add up to 1.
    experts : int
        Of the layer; without any, tokens are placed by position, whole pages at a time.
    share : float
        The part of the tokens outside of the window that is kept here: the window is kept everywhere.
    """
    size = options.page_size
    sink = min(tokens, -(-options.sink_tokens // size) * size)
    outside = max(0, tokens - sink - options.recent_window) // size * size
    window = -(-sink // size) + -(-(tokens - sink - outside) // size)
    by_position = options.placement == "hash" or not experts
    if by_position:
        return PageCounts(window, 0.0, outside / size * share, round(outside * share))
    if share < 1:
        return _part_counts(window, outside * share, shards_of_part(len(loads), share), size)
    began, full = expected_pages(round(outside * share), loads, size)
    return PageCounts(window, began - full, full, round(outside * share))


def shards_of_part(shards: int, share: float) -> float:
    """Return of how many shards a part has pages, on average: one is divided at each boundary between parts."""
    return shards * share + 1 - share


def _part_counts(window: float, tokens: float, shards: float, size: int) -> PageCounts:
    """Return the pages of one of several parts, which has some of the shards or a fraction of one.

    How many tokens come here is as random as the last page's remainder, which is as likely to be anything.
    """
    open_pages = min(shards * (size - 1) / size, tokens)
    full = max(0.0, tokens / size - open_pages / 2)
    return PageCounts(window, open_pages, full, round(tokens))


def shard_loads(layer: LayerShape, options: PiKVConfig, loads: Sequence[float] | None) -> tuple[float, ...]:
    """Return the shares of the tokens by shard: those given, else equal ones."""
    if loads is not None:
        return tuple(loads)
    return uniform_loads(min(options.num_shards, layer.experts) if layer.experts else options.num_shards)


def plain_pages(
    capacity: float, held: float, contents: CacheContents, now: PageCounts, flushes: int, by_expert: bool
) -> float:
    """Return the expected size of the plain pool after pages have left the windows of all rows `flushes` times.

    The tokens of a page begin one page in the shards on average, before the page itself is free. Where experts decide
    it may be none or several: about a Poisson number for all rows, whose largest of all times the pool has grown for.
    """
    options, batch = contents.options, contents.batch
    growth = BUDGET_GROWTH if options.budget is not None else PLAIN_GROWTH
    if not flushes:
        return grown(capacity, held, growth)
    size = options.page_size
    fullest = -(-options.sink_tokens // size) + (options.recent_window + size) / size
    needed = held + batch * max(0.0, fullest - now.window)
    if not by_expert:
        return grown(capacity, needed + batch, growth)
    at_most = poisson_cdf(batch + 12 * math.isqrt(batch) + 11, batch) ** flushes
    chances = np.diff(at_most, prepend=0.0)
    return float(sum(p * grown(capacity, needed + begun, growth) for begun, p in enumerate(chances) if p > 1e-6))


def given_back(capacity: float, used: float, rows: int) -> float:
    """Return the pages of a plain pool that had `capacity` for a prompt, once it is packed and `used` are left."""
    if capacity <= used:
        return capacity
    return used + kept_free(round(used), round(capacity - used), rows, PLAIN_GROWTH)


def grown(capacity: float, needed: float, growth: float) -> float:
    """Return the pages of a pool that began with `capacity` and grew until it had `needed`."""
    if not capacity:
        return needed
    while capacity < needed:
        capacity += max(MIN_GROWTH, int(capacity * growth))
    return capacity
