"""The widths of all tokens of layers with K/V of equal sizes, under one byte budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bit_allocation import EVICTED, FULL, PageCost, allocate_beside, pages_nbytes
from .earlier_pages import StoredPages, competing
from .eviction_loss import WIDTH_LOSS

#: Bytes of a layer that no page accounts for: the empty pools' bookkeeping.
LAYER_BYTES = 512

#: Tokens whose key or value is so many times longer than the lane's median have int8 pages of their own, or stay in
#: full precision: a page's ranges are those of its tokens, and one such token would take its neighbours' bits.
OUTSIZED, HUGE = 8.0, 64.0


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What is known of the tokens of a layer when it is decided which of them stay: without keys and values.

    Attributes
    ----------
    dims : tuple of int
        D and Dv, channels of keys and of values.
    element_size : int
        Bytes of a number as the model makes it.
    stored : torch.Tensor
        `(B, H, T)` bool: neither padding nor evicted.
    apart : torch.Tensor
        `(B, H, T)` int8, see :func:`outsized`.
    loss : torch.Tensor
        `(B, H, T)` float32, what evicting each costs, in a unit that all layers share.
    pages : StoredPages
        What is packed already.
    """

    dims: tuple[int, int]
    element_size: int
    stored: torch.Tensor
    apart: torch.Tensor
    loss: torch.Tensor
    pages: StoredPages

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, stored: torch.Tensor, loss: torch.Tensor, pages: StoredPages
    ) -> "LayerTokens":
        """Return what there is to know of keys `(B, H, T, D)` and values `(B, H, T, Dv)` by column."""
        dims = keys.shape[-1], values.shape[-1]
        return cls(dims, keys.element_size(), stored, outsized(keys, values, stored), loss, pages)

    @property
    def shape(self) -> tuple[int, ...]:
        """What layers have to have in common to share a budget: those of others divide theirs in proportion."""
        return (*self.stored.shape, *self.dims)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of one KV head as the model makes it."""
        return sum(self.dims) * self.element_size

    def of_row(self, row: int) -> "LayerTokens":
        """Return one sequence."""
        stored, apart, loss = (part[row : row + 1] for part in (self.stored, self.apart, self.loss))
        return LayerTokens(self.dims, self.element_size, stored, apart, loss, self.pages.of_row(row))


def same_shape(layers: Sequence[LayerTokens]) -> list[list[int]]:
    """Group layers whose K/V have the same sizes: a budget is divided within each, in proportion to its bytes."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.shape, []).append(index)
    return list(groups.values())


def token_widths(
    layers: Sequence[LayerTokens],
    budget: int,
    page_size: int,
    *,
    widths: Sequence[int] = (2, 4, 8, FULL),
    sinks: int = 4,
    recent: int = 0,
    may_exceed: bool = False,
    enough: float = -math.inf,
) -> torch.Tensor:
    """Return the bits of every token, such that pages fit the budget and little is lost.

    Parameters
    ----------
    layers : sequence of LayerTokens
        L layers with K/V of equal sizes.
    budget : int
        Bytes for all of them.
    page_size : int
        P, tokens of a page.
    widths : sequence of int
        Bits that may be given beside 0.
    sinks, recent : int
        First and last tokens of each lane that are never evicted.
    may_exceed : bool
        Whether a budget that is less than what is never evicted is exceeded instead of refused.
    enough : float
        Sum of losses at which no more bytes are given, though the budget may hold them.

    Returns
    -------
    torch.Tensor
        `(L, B, H, T)` uint8; 0 evicts, and what stays as it is in pages that are packed already has :data:`FULL`.

    Raises
    ------
    BudgetTooSmallError
        If the budget does not hold what is never evicted.
    """
    priced = PageCost.of_pages(page_size, *layers[0].dims, layers[0].element_size)
    cost = PageCost(page_size, {width: priced.nbytes[width] for width in widths})
    stored, losses = torch.stack([each.stored for each in layers]), torch.stack([each.loss for each in layers])
    inside = torch.stack([each.pages.mark(torch.zeros_like(each.stored)) for each in layers])
    needed = _never_evicted(stored, sinks, recent).expand_as(stored)
    fresh, left = stored & ~inside, budget
    apart = torch.stack([each.apart for each in layers]) * fresh
    if pages_nbytes(apart, priced) > left // 2:
        # So many are not outsized but common.
        apart = torch.zeros_like(apart)
    left -= pages_nbytes(apart, priced)
    fresh &= apart == 0
    rates = {EVICTED: 1.0, **{width: WIDTH_LOSS.get(width, 0.0) for width in widths}}
    curve = {width: (losses * rate).where(fresh, 0) for width, rate in rates.items()}
    pages, choices = competing([each.pages for each in layers], list(losses), needed, cost)
    if may_exceed:
        left = max(left, least_bytes(fresh, needed, cost) + int(pages.nbytes[pages.needed, 1:].amin(dim=1).sum()))
    given, chosen = allocate_beside(curve, cost, left, sinks=0, valid=fresh, needed=needed, pages=pages, enough=enough)
    result = (given + apart).to(torch.uint8)
    bits = choices.gather(1, chosen.unsqueeze(1)).squeeze(1)
    for each, of_layer, into in zip(layers, bits.split([len(each.pages.rows) for each in layers]), result, strict=True):
        each.pages.write(into, of_layer)
    return result


def _never_evicted(stored: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """Return the first and last tokens of each sequence, `(L, B, 1, T)` bool, of `(L, B, H, T)` that are stored."""
    rank = stored.any(dim=2, keepdim=True).cumsum(dim=-1)
    columns = torch.arange(stored.shape[-1], device=stored.device)
    first = (rank <= sinks) if sinks else torch.zeros_like(rank, dtype=torch.bool)
    return (first | (columns >= stored.shape[-1] - recent)) & stored.any(dim=2, keepdim=True)


def outsized(keys: torch.Tensor, values: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return the widths of tokens that would spoil their page's ranges, `(B, H, T)` int8; 0 for all others."""
    widths = torch.zeros_like(stored, dtype=torch.int8)
    for part in (keys, values):
        length = part.float().norm(dim=-1)
        usual = length.masked_fill(~stored, torch.nan).nanmedian(dim=-1, keepdim=True).values
        widths = torch.maximum(widths, 8 * (length > OUTSIZED * usual).to(torch.int8))
        widths = torch.maximum(widths, FULL * (length > HUGE * usual).to(torch.int8))
    return widths


def least_bytes(fresh: torch.Tensor, needed: torch.Tensor, cost: PageCost) -> int:
    """Return the bytes of what each lane has to keep of `(..., T)` tokens, at least one, in the narrowest pages."""
    tokens = torch.maximum((fresh & needed).sum(dim=-1), fresh.sum(dim=-1).clamp(max=1))
    return int(((tokens + cost.page_size - 1) // cost.page_size).sum()) * min(cost.nbytes.values())
