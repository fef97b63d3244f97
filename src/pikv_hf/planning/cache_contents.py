"""What a plan takes a cache to hold: the tokens of each row, and how they are stored."""

import dataclasses

from pikv_hf.config import PiKVConfig


@dataclasses.dataclass(frozen=True, slots=True)
class CacheContents:
    """The tokens of a cache, of one of its layers, or of what one of several devices keeps of them.

    Attributes
    ----------
    tokens : int
        Of each row.
    batch : int
        Rows, which share nothing.
    options : PiKVConfig
        How tokens are stored: codecs, pages, window, routing, budget.
    generated : int
        How many of the tokens were decoded one at a time, for which pools have grown.
    loads : tuple of float or None
        Shares of the tokens by shard, which add up to 1; equal ones by default.
    share : float
        The part of the tokens outside of the window that is kept here; the window is kept everywhere.
    """

    tokens: int
    batch: int
    options: PiKVConfig
    generated: int = 0
    loads: tuple[float, ...] | None = None
    share: float = 1.0
