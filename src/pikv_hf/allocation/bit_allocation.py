"""Which width each token of a KV cache gets: reverse water-filling of one byte budget over lanes and tokens.

A lane is one (sequence, layer, KV head). Rate-distortion theory gives each component of a source as many bits as make
the slopes of all their distortion curves equal (Cover and Thomas, Elements of Information Theory, section 10.3.3); RDKV
(arXiv 2605.08317) does so for the tokens of a KV cache, with eviction as width 0. Bytes here come in pages, so that is
what widths are given to: the tokens of a lane are sorted by what losing them costs and cut into pages, and each page
follows its own curve. Page rounding is then part of the problem instead of an error on top of its solution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.page_codes import OUTLIERS

#: Width of a token that is evicted, and of one that is stored as it is.
EVICTED, FULL = 0, 16

#: Bytes that the host spends on a page, for its row of the page table and its statistics.
HOST_BYTES = 37

_POSITION_BYTES = 4


class BudgetTooSmallError(ValueError):
    """A budget does not hold what may not be evicted, in the narrowest widths that there are.

    Attributes
    ----------
    budget, least : int
        Bytes: what there is, and what would be needed.
    """

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"a budget of {budget} bytes does not hold the sinks of every lane, which take {least} bytes")
        self.budget, self.least = budget, least


@dataclass(frozen=True, slots=True)
class PageCost:
    """What a page of one lane costs.

    Attributes
    ----------
    page_size : int
        P, tokens per page; a page that is partly filled costs as much.
    nbytes : Mapping
        Bytes of a page for each width that may be given, in bits per number: 2, 4 and 8 for packed integers, 16
        (:data:`FULL`) for what is stored as it is, whatever its dtype.

    Raises
    ------
    ValueError
        If there is no width, or a number is not positive.
    """

    page_size: int
    nbytes: Mapping[int, int]

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"a page holds at least one token, got page_size={self.page_size}")
        wrong = {width: cost for width, cost in self.nbytes.items() if width <= EVICTED or cost <= 0}
        if wrong or not self.nbytes:
            raise ValueError(
                f"widths and bytes of a page are positive and at least one is given, got {dict(self.nbytes)}"
            )

    @classmethod
    def of_pages(cls, page_size: int, key_dim: int, value_dim: int | None = None, element_size: int = 2) -> "PageCost":
        """Return the cost of the pages of :mod:`pikv_hf.kernels.page_codes`, positions and host bytes included.

        Parameters
        ----------
        page_size : int
            P, tokens per page.
        key_dim, value_dim : int
            Channels of keys and of values; by default as many of these as of those.
        element_size : int
            Bytes of a number that is stored as it is.
        """
        values = key_dim if value_dim is None else value_dim
        shared = _POSITION_BYTES * page_size + HOST_BYTES
        few = min(OUTLIERS, key_dim)
        # Per channel a spread (1 byte) and a floor (2 of a key, 1 of a value); outliers: int16 and 4 bits per token.
        ranges = 3 * key_dim + 2 * values + 2 * few + (page_size + 1) // 2 * few
        packed = {bits: _packed_bytes(page_size, bits) * (key_dim + values) + ranges + shared for bits in (2, 4, 8)}
        return cls(page_size, {**packed, FULL: element_size * (key_dim + values) * page_size + shared})


@dataclass(frozen=True, slots=True)
class PackedPages:
    """Pages that were packed before: each stays as it is, goes, or is packed again in fewer bits.

    Attributes
    ----------
    losses : torch.Tensor
        `(n, W)` float64, for width 0 and for the W - 1 widths that may be given, from narrow to wide: what is lost with
        the page in that width, or as it is where that is no narrower.
    nbytes : torch.Tensor
        `(n, W)` int64, what the page then takes.
    needed : torch.Tensor
        `(n,)` bool, those that may not go.
    """

    losses: torch.Tensor
    nbytes: torch.Tensor
    needed: torch.Tensor


def _packed_bytes(page_size: int, bits: int) -> int:
    per_byte = 8 // bits
    return (page_size + per_byte - 1) // per_byte


def allocate(
    losses: Mapping[int, torch.Tensor],
    cost: PageCost,
    budget: int,
    *,
    sinks: int = 4,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give every token a width; see :func:`allocate_beside`, which this is without pages or further needed tokens."""
    return allocate_beside(losses, cost, budget, sinks=sinks, valid=valid)[0]


def allocate_beside(
    losses: Mapping[int, torch.Tensor],
    cost: PageCost,
    budget: int,
    *,
    sinks: int = 4,
    valid: torch.Tensor | None = None,
    needed: torch.Tensor | None = None,
    pages: PackedPages | None = None,
    enough: float = -math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every token a width such that the sum of losses is small and the pages fit the budget.

    Equal losses are decided by position and lane, so the result is the same every time. A larger budget never gives any
    token a cheaper width.

    Parameters
    ----------
    losses : Mapping
        For width 0, which is eviction, and for every width of `cost` that may be used, the loss of giving each token
        this width: `(..., T)` floating point, finite and not negative, in any unit that all lanes share. Leading
        dimensions, such as layers and KV heads, are the lanes. A missing :data:`FULL` loses nothing.
    cost : PageCost
        Bytes of a page.
    budget : int
        Bytes for all lanes together.
    sinks : int
        First tokens of every lane that are never evicted; at least one token never is.
    valid : torch.Tensor, optional
        `(..., T)` bool or what broadcasts to it, False for padding, which is not stored.
    needed : torch.Tensor, optional
        `(..., T)` bool or what broadcasts to it, further tokens that are never evicted.
    pages : PackedPages, optional
        Pages that compete for the same budget.
    enough : float
        Sum of losses at which no more bytes are given, though the budget may hold them.

    Returns
    -------
    tuple of torch.Tensor
        `(..., T)` int8, bits per number: 0 for evicted tokens; and `(n,)` int64, which of their W widths pages get.

    Raises
    ------
    BudgetTooSmallError
        If the budget does not hold the sinks of all lanes in the narrowest width.
    ValueError
        If the losses do not fit the costs.
    """
    widths, curve = _curve(losses, cost)
    shape = curve.shape[1:]
    tokens = shape[-1]
    real = torch.ones((1, 1), dtype=torch.bool, device=curve.device) if valid is None else valid
    real = real.expand(shape).reshape(-1, tokens)
    curve = curve.reshape(len(widths), -1, tokens) * real
    never = None if needed is None else needed.expand(shape).reshape(-1, tokens)
    order, counts = _order(curve[0] - curve[1], real, sinks, never)
    prices = torch.tensor([cost.nbytes.get(width, 0) for width in widths], device=curve.device)
    by_page = _page_losses(curve, order, cost.page_size)
    start = torch.arange(by_page.shape[1], device=curve.device) * cost.page_size
    by_page, forced = by_page.flatten(0, 1), (start < counts.unsqueeze(1)).flatten()
    prices, fresh = prices.expand_as(by_page), len(by_page)
    if pages is not None:
        by_page, prices = torch.cat([by_page, pages.losses]), torch.cat([prices, pages.nbytes])
        forced = torch.cat([forced, pages.needed])
    level = _water_fill(by_page, prices, forced, budget, enough)
    given = torch.tensor(widths, dtype=torch.int8, device=curve.device)[level[:fresh]].view(len(order), -1)
    per_token = given.repeat_interleave(cost.page_size, dim=1)[:, :tokens]
    return torch.zeros_like(per_token).scatter_(1, order, per_token).mul_(real).view(shape), level[fresh:]


def pages_nbytes(widths: torch.Tensor, cost: PageCost) -> int:
    """Return the bytes of the pages of all lanes, tokens of one width sharing pages.

    Parameters
    ----------
    widths : torch.Tensor
        `(..., T)` integers, as :func:`allocate` returns them.
    cost : PageCost
        Bytes of a page.
    """
    total = 0
    for width, nbytes in cost.nbytes.items():
        counts = (widths == width).sum(-1)
        total += nbytes * int(((counts + cost.page_size - 1) // cost.page_size).sum())
    return total


def _curve(losses: Mapping[int, torch.Tensor], cost: PageCost) -> tuple[list[int], torch.Tensor]:
    """Return the widths from narrow to wide and their losses `(W, ..., T)`, float32."""
    unpriced = sorted(set(losses) - set(cost.nbytes) - {EVICTED})
    if EVICTED not in losses or unpriced:
        raise ValueError(f"losses are given for width 0 and for widths of {sorted(cost.nbytes)}, got {sorted(losses)}")
    evicted = losses[EVICTED]
    all_losses = dict(losses)
    if FULL in cost.nbytes:
        all_losses.setdefault(FULL, torch.zeros_like(evicted))
    widths = sorted(all_losses)
    if len(widths) < 2:
        raise ValueError(f"at least one width beside eviction is needed, got {sorted(losses)}")
    shapes = {tuple(loss.shape) for loss in all_losses.values()}
    if len(shapes) > 1:
        raise ValueError(f"losses have different shapes: {sorted(shapes)}")
    curve = torch.stack([all_losses[width].float() for width in widths])
    if not bool(torch.isfinite(curve).all()) or bool((curve < 0).any()):
        raise ValueError("losses are finite and not negative, got others")
    return widths, curve


def _order(
    gain: torch.Tensor, real: torch.Tensor, sinks: int, needed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of each lane `(N, T)`, what stays first, then by gain, padding last; and how many stay."""
    rank = real.cumsum(1)
    first = real & (rank <= sinks if needed is None else (rank <= sinks) | needed)
    key = gain.masked_fill(first, torch.inf).masked_fill(~real, -torch.inf)
    stay = torch.maximum(first.sum(1), rank[:, -1].clamp(max=1))
    return key.argsort(dim=1, descending=True, stable=True), stay


def _page_losses(curve: torch.Tensor, order: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the losses of pages of tokens in that order, `(N, pages, W)` float64, for `curve` `(W, N, T)`."""
    missing = -order.shape[1] % page_size
    sums = []
    for losses in curve:
        ordered = torch.nn.functional.pad(losses.gather(1, order), (0, missing))
        sums.append(ordered.unflatten(1, (-1, page_size)).sum(2, dtype=torch.float64))
    return torch.stack(sums, dim=-1)


def _water_fill(
    losses: torch.Tensor, prices: torch.Tensor, forced: torch.Tensor, budget: int, enough: float
) -> torch.Tensor:
    """Return which width each page gets, `(pages,)` int64, of those that `(pages, W)` losses and prices are of.

    Every page climbs the lower convex hull of its points (price, loss); all these steps are taken in the order of what
    they gain per byte, until the first one that the budget does not hold, or until the losses are `enough`.
    """
    least = forced * (prices[:, 1:].argmin(dim=1) + 1)
    spent = int(prices.gather(1, least.unsqueeze(1)).sum())
    if spent > budget:
        raise BudgetTooSmallError(budget, spent)
    slopes, targets = _hull_steps(losses, prices, least)
    befores = torch.cat([least.unsqueeze(1), targets[:, :-1]], dim=1)
    order = slopes.flatten().argsort(descending=True, stable=True)
    order = order[slopes.flatten()[order] > 0]
    total = spent + (prices.gather(1, targets) - prices.gather(1, befores)).flatten()[order].cumsum(0)
    gains = (losses.gather(1, befores) - losses.gather(1, targets)).flatten()[order]
    lost = losses.gather(1, least.unsqueeze(1)).sum() - (gains.cumsum(0) - gains)
    taken = torch.zeros(slopes.numel(), dtype=torch.bool, device=losses.device)
    taken[order[(total <= budget) & (lost > enough)]] = True
    steps = taken.view_as(slopes).sum(1, keepdim=True)
    return torch.cat([least.unsqueeze(1), targets], dim=1).gather(1, steps).squeeze(1)


def _hull_steps(losses: torch.Tensor, prices: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gain per byte (0: no step) and target of the steps of each page up its hull, `(pages, W - 1)` each."""
    slopes, targets = [], []
    at = least
    for _ in range(prices.shape[1] - 1):
        gain = losses.gather(1, at.unsqueeze(1)) - losses
        price = prices - prices.gather(1, at.unsqueeze(1))
        slope = torch.where(price > 0, gain / price.clamp(min=1), 0.0).clamp(min=0)
        best, target = slope.max(dim=1)
        at = torch.where(best > 0, target, at)
        slopes.append(best)
        targets.append(at)
    return torch.stack(slopes, dim=1), torch.stack(targets, dim=1)
