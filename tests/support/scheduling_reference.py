"""Scheduling policies, slow and obvious: lists and loops over the raw trace, one victim after the other.

Nothing is shared with `pikv_hf.scheduling.policies.registry`; every statistic is worked out anew from what happened.
"""

import dataclasses
import math
from collections.abc import Callable

HALF_LIFE = 64


@dataclasses.dataclass
class Page:
    """A page and everything that happened to it."""

    number: int
    born: int
    newest: int
    tokens: int
    lane: int
    shares: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    uses: list[int] = dataclasses.field(default_factory=list)
    bound: float | None = None

    def mass(self) -> float:
        return sum(share for _, share in self.shares)

    def mass_per_step(self, now: int) -> float:
        return self.mass() / (now - self.born)

    def recent_per_step(self, now: int) -> float:
        """The mean of its shares where one counts half for every HALF_LIFE steps since."""
        taken, possible, shares = 0.0, 0.0, dict(self.shares)
        for step in range(self.born + 1, now + 1):
            taken = taken * 0.5 ** (1 / HALF_LIFE) + shares.get(step, 0.0)
            possible = possible * 0.5 ** (1 / HALF_LIFE) + 1
        return taken / possible

    def last_use(self) -> int:
        return self.uses[-1] if self.uses else self.born

    def distance(self, now: int) -> int:
        """Steps from use to use: those between the last two, or those it has waited since; its age without two uses."""
        if len(self.uses) < 2:
            return now - self.born
        return max(self.uses[-1] - self.uses[-2], now - self.uses[-1])


Pages = list[Page]


def attend(pages: Pages, now: int, shares: dict[int, float], read: int) -> None:
    """Let the pages take their shares of a step that reads `read` pages."""
    for page in pages:
        if page.number in shares:
            page.shares.append((now, shares[page.number]))
            if shares[page.number] >= 1 / read:
                page.uses.append(now)


def _lowest_first(pages: Pages, value: Callable[[Page], float]) -> Pages:
    """Take out the page with the lowest value, the oldest of equal ones, until none is left."""
    left, out = list(pages), []
    while left:
        worst = left[0]
        for page in left[1:]:
            if value(page) < value(worst) or (value(page) == value(worst) and page.newest < worst.newest):
                worst = page
        left.remove(worst)
        out.append(worst)
    return out


def streaming_llm(pages: Pages, now: int) -> Pages:
    return sorted(pages, key=lambda page: page.newest)


def _per_step(pages: Pages, now: int, of: Callable[[Page, int], float]) -> tuple[dict[int, float], float]:
    """Return what pages took per step, by number, and the mean, which also stands for pages that no step has seen."""
    seen = {page.number: of(page, now) for page in pages if page.born < now}
    mean = math.fsum(seen.values()) / len(seen) if seen else 0.0
    return {page.number: seen.get(page.number, mean) for page in pages}, mean


def h2o(pages: Pages, now: int, per_step: bool = True) -> Pages:
    shares, _ = _per_step(pages, now, Page.mass_per_step)
    return _lowest_first(pages, lambda page: shares[page.number] if per_step else page.mass())


def _queue(pages: Pages, now: int, *, moves: bool) -> Pages:
    """Replay a queue: a page joins its end when it is filled and, if it moves, returns there when it is used."""
    queue: Pages = []
    for step in range(now + 1):
        for page in sorted(pages, key=lambda page: page.newest):
            if page.born == step or (moves and step in page.uses):
                if page in queue:
                    queue.remove(page)
                queue.append(page)
    return queue


def lru(pages: Pages, now: int) -> Pages:
    return _queue(pages, now, moves=True)


def lru_plus(pages: Pages, now: int) -> Pages:
    shares, _ = _per_step(pages, now, Page.mass_per_step)
    largest = max(shares.values(), default=0.0)

    def value(page: Page) -> float:
        relative = shares[page.number] / largest if largest else 0.0
        return -(now - page.last_use() + 1) / ((1 + len(page.uses)) * (1 + relative))

    return _lowest_first(pages, value)


def quest(pages: Pages, now: int) -> Pages:
    shares, _ = _per_step(pages, now, Page.recent_per_step)
    return _lowest_first(pages, lambda page: shares[page.number] if page.bound is None else page.bound)


def ada_kv(pages: Pages, now: int, alpha: float = 0.2) -> Pages:
    """Let unsafe pages of all lanes go by their part of what the lane's pages took, then the safe ones."""
    shares, _ = _per_step(pages, now, Page.mass_per_step)
    lanes: dict[int, Pages] = {}
    for page in pages:
        lanes.setdefault(page.lane, []).append(page)
    part: dict[int, float] = {}
    safe: Pages = []
    for lane in lanes.values():
        total = sum(shares[page.number] for page in lane)
        for page in lane:
            part[page.number] = shares[page.number] / total if total else 0.0
        kept = _lowest_first(lane, lambda page: part[page.number])[::-1]
        safe += kept[: int(alpha * len(pages) / len(lanes))]
    unsafe = [page for page in pages if page not in safe]
    return _lowest_first(unsafe, lambda page: part[page.number]) + _lowest_first(safe, lambda page: part[page.number])


def duo(pages: Pages, now: int, little: float = 0.1) -> Pages:
    """Let the pages of lanes with little attention in them go by position, then the others by last use."""
    streaming, retrieval = [], []
    for page in pages:
        lane = [other for other in pages if other.lane == page.lane]
        steps = max(now - min(other.born for other in lane), 1)
        per_step = sum(other.mass() for other in lane) / steps
        (streaming if per_step < little else retrieval).append(page)
    return streaming_llm(streaming, now) + lru(retrieval, now)


def two_queue(pages: Pages, now: int, first_share: float = 0.25) -> Pages:
    """Take from the FIFO while it is too long, else from the LRU queue while there is one, else from the FIFO."""
    first = _queue([page for page in pages if len(page.uses) < 2], now, moves=False)
    others = _queue([page for page in pages if len(page.uses) >= 2], now, moves=True)
    most = int(first_share * len(pages))
    out = []
    while first or others:
        from_first = len(first) > most or not others
        out.append(first.pop(0) if from_first else others.pop(0))
    return out


def reuse_distance(pages: Pages, now: int) -> Pages:
    return _lowest_first(pages, lambda page: -page.distance(now))


def pikv(
    pages: Pages, now: int, mass: float, recency: float, reuse: float, half_life: float, bound: float = 0.0
) -> Pages:
    """Let the page with the lowest weighted mean of mass, recency, reuse and, if known, rank by bound go."""
    shares, mean = _per_step(pages, now, Page.recent_per_step)

    def value(page: Page) -> float:
        by_mass = shares[page.number] / (shares[page.number] + mean) if mean else 0.0
        by_recency = 2 ** (-(now - page.last_use()) / half_life)
        by_reuse = 1 / (1 + page.distance(now) / half_life)
        total = mass * by_mass + recency * by_recency + reuse * by_reuse
        if page.bound is None:
            return total / (mass + recency + reuse)
        lower = sum(other.bound < page.bound for other in pages)
        total += bound * (lower / max(len(pages) - 1, 1))
        return total / (mass + recency + reuse + bound)

    return _lowest_first(pages, value)


ORDERS: dict[str, Callable[..., Pages]] = {
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "lru": lru,
    "lru_plus": lru_plus,
    "quest": quest,
    "ada_kv": ada_kv,
    "duo": duo,
    "two_queue": two_queue,
    "reuse_distance": reuse_distance,
}


def evicted(order: Pages, tokens: int) -> Pages:
    """Return pages from the front until they hold enough tokens."""
    out: Pages = []
    while order[len(out) :] and sum(page.tokens for page in out) < tokens:
        out.append(order[len(out)])
    return out
