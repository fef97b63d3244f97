"""Shards to parts: which device, or which process, has the pages of which shard."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .load_balancing import pack

# Consecutive multiples of it, modulo 1, fill the unit interval evenly, and so does every arithmetic sequence of them.
GOLDEN = (5**0.5 - 1) / 2

#: Parts may hold this much more than their shares before shards are divided anew. What is due at most is 10%, with
#: pages that are not full and pools that grow in steps.
MAX_SKEW = 0.03

#: Shards are divided anew as if this share of what is there was to come, and everything to be even then.
AHEAD = 0.1

#: Pages of tokens after which a count weighs half: what is to come is like what came last, whatever came before.
LOAD_HALF_LIFE = 32

#: Pages per part below which nothing is divided anew: single ones would tip the scales.
MIN_PAGES = 8


class ShardMap:
    """Divides the shards of one layer among its parts so that each gets its share of the tokens.

    Shards, each as long as its load, and parts, each as long as its weight, are laid side by side along the same line:
    a shard is of the part beside it. Neighbouring shards stay together, parts are as full as they should be whatever
    the loads, and at most `parts - 1` shards are divided, page by page of the sequence, between parts. (McNaughton's
    wrap-around rule for scheduling on identical machines.)

    All parts, also those of other processes, compute the same from the same tokens; nothing is exchanged.

    Parameters
    ----------
    num_shards : int
        Shards of the layer.
    weights : sequence of float
        The share of the tokens that each part is to get.
    page_size : int
        Tokens per page.
    whole : bool
        Never divide a shard, however unevenly that fills the parts.

    Attributes
    ----------
    fractions : numpy.ndarray
        `(S, G)`, the share of each shard that goes to each part.
    loads : numpy.ndarray
        `(S,)` int64, tokens of each shard so far.
    placed : numpy.ndarray
        `(G,)` float64, tokens of each part so far.
    recent : numpy.ndarray
        `(S,)` float64, tokens of each shard, those of the last pages most.
    """

    def __init__(self, num_shards: int, weights: "np.ndarray | list[float]", page_size: int, whole: bool) -> None:
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.num_shards, self.page_size, self.whole = num_shards, page_size, whole
        self.loads = np.zeros(num_shards, dtype=np.int64)
        self.placed = np.zeros(len(self.weights), dtype=np.float64)
        self.recent = np.zeros(num_shards, dtype=np.float64)
        self.divide(self.loads)

    @property
    def parts(self) -> int:
        """G."""
        return len(self.weights)

    def divide(self, loads: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Divide the shards anew, by loads `(S,)` and, for the time being, by other weights `(G,)`."""
        weights = self.weights if weights is None else weights / weights.sum()
        # A shard without tokens has a place too, should one come.
        lengths = loads + 1.0
        if self.whole:
            # Parts that are to have nothing are no bins.
            bins = np.flatnonzero(self.weights)
            self.fractions = np.eye(self.parts)[bins[pack(lengths, len(bins))]]
        else:
            ends, edges = lengths.cumsum() / lengths.sum(), weights.cumsum()
            starts = ends - lengths / lengths.sum()
            shared = np.minimum(ends[:, None], edges) - np.maximum(starts[:, None], edges - weights)
            shared = shared.clip(min=0)
            self.fractions = shared / shared.sum(axis=1, keepdims=True)
        self._note_ends()

    def _note_ends(self) -> None:
        ends = self.fractions.cumsum(axis=1)
        # Nothing is left for a part that comes after the last share, whatever rounding says.
        ends[ends > 1 - 1e-9] = 1.0
        self._ends = (ends + np.arange(self.num_shards)[:, None]).ravel()

    def is_to_plan(self, tokens: int) -> bool:
        """Return whether so many new tokens of each row are worth a plan of their own."""
        return not self.placed.any() or tokens >= MIN_PAGES * self.page_size * self.parts

    def plan(self, coming: np.ndarray) -> None:
        """Divide the shards so that parts are as full as they should be once `(S,)` more tokens have come."""
        missing = (self.weights * (self.placed.sum() + coming.sum()) - self.placed).clip(min=0)
        if coming.any() and not (self.whole and self.placed.any()):
            self.divide(coming, missing)

    def own(self, shards: np.ndarray, positions: np.ndarray, part: int) -> np.ndarray:
        """Return the shards of a part's own tokens, and codes below 0 for those of others.

        Parameters
        ----------
        shards, positions : numpy.ndarray
            `(n,)` integers, of tokens.
        part : int
            Whose they may be.

        Returns
        -------
        numpy.ndarray
            `(n,)` int64. A code tells :meth:`note` part and shard.
        """
        where = self._parts_of(shards, positions)
        return np.where(where == part, shards, -1 - (where * self.num_shards + shards))

    def _parts_of(self, shards: np.ndarray, positions: np.ndarray) -> np.ndarray:
        # Below 1 also once a shard's number is added.
        place = np.minimum(positions // self.page_size * GOLDEN % 1.0, 1 - 1e-9)
        # One search for all shards: shard s has the numbers from s to s + 1.
        return np.searchsorted(self._ends, shards + place, side="right") - shards * self.parts

    def note(self, coded: np.ndarray, part: int) -> None:
        """Count tokens that left the window, as :meth:`own` gave them to a part."""
        others = -1 - coded
        foreign = coded < 0
        where = np.where(foreign, others // self.num_shards, part)
        shards = np.where(foreign, others % self.num_shards, coded)
        self.placed += np.bincount(where, minlength=self.parts)
        counts = np.bincount(shards, minlength=self.num_shards)
        self.loads += counts
        if len(coded):
            # As if they had come one by one, in any order: a prompt weighs no more than its last pages.
            lives = np.log(2) * len(coded) / (LOAD_HALF_LIFE * self.page_size)
            self.recent = self.recent * np.exp(-lives) + counts * (1 - np.exp(-lives)) / lives

    @property
    def skew(self) -> float:
        """By how much the fullest part exceeds its share."""
        total = self.placed.sum()
        known = self.weights > 0
        return float((self.placed[known] / self.weights[known]).max() / total - 1) if total else 0.0

    def divide_if_skewed(self) -> bool:
        """Divide the shards anew if parts are filled too unevenly; return whether that was so.

        What comes next fills the parts that have too little, so that balance returns although nothing is moved.
        """
        total = self.placed.sum()
        if self.whole or total < MIN_PAGES * self.page_size * self.parts or self.skew <= MAX_SKEW:
            return False
        missing = (self.weights * total * (1 + AHEAD) - self.placed).clip(min=0)
        self.divide(self.recent, missing)
        return True

    def add_evenly(self, tokens: float) -> None:
        """Count tokens that parts got by their weights, whatever their shards."""
        self.placed += self.weights * tokens

    def rescale(self, share: float) -> None:
        """Forget all but a share of what was counted: tokens are gone."""
        self.placed *= share
        self.loads = (self.loads * share).astype(np.int64)

    def state(self) -> dict[str, np.ndarray]:
        """Return what :meth:`resume` needs to go on alike: `fractions`, `loads`, `placed` and `recent`."""
        return {"fractions": self.fractions, "loads": self.loads, "placed": self.placed, "recent": self.recent}

    def resume(self, fractions: np.ndarray, loads: np.ndarray, placed: np.ndarray, recent: np.ndarray) -> None:
        """Go on as another map of so many shards and parts did, with its :meth:`state`; weights may be others."""
        self.fractions, self.loads = fractions.copy(), loads.copy()
        self.placed, self.recent = placed.copy(), recent.copy()
        self._note_ends()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Forget what was counted and planned if the block raises."""
        before = {name: array.copy() for name, array in self.state().items()}
        try:
            yield
        except BaseException:
            self.resume(**before)
            raise
