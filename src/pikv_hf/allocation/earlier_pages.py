"""What was packed earlier: beside new tokens it stays, goes, or is packed again in fewer bits, page by page."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bit_allocation import EVICTED, FULL, PackedPages, PageCost
from .eviction_loss import WIDTH_LOSS


@dataclass(frozen=True, slots=True)
class StoredPages:
    """The packed pages of a layer.

    Attributes
    ----------
    rows : torch.Tensor
        `(n,)` int64 sequences.
    columns : torch.Tensor
        `(n, H, P)` int64 columns of the page's tokens in each KV head, -1 where it has none.
    nbytes : torch.Tensor
        `(n,)` int64.
    widths : torch.Tensor
        `(n,)` int64, bits of keys or of values, whichever are fewer.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    nbytes: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def none(cls, device: torch.device) -> "StoredPages":
        """Return no pages."""
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(empty, empty.new_zeros((0, 1, 1)), empty, empty)

    def pick(self, which: torch.Tensor) -> "StoredPages":
        """Return some of the pages, by a mask `(n,)`."""
        return StoredPages(self.rows[which], self.columns[which], self.nbytes[which], self.widths[which])

    def of_row(self, row: int) -> "StoredPages":
        """Return the pages of one sequence, as those of a batch of one."""
        mine = self.pick(self.rows == row)
        return StoredPages(torch.zeros_like(mine.rows), mine.columns, mine.nbytes, mine.widths)

    def mark(self, mask: torch.Tensor) -> torch.Tensor:
        """Set `(B, H, T)` to True at the tokens of the pages, and return it."""
        page, head, slot = (self.columns >= 0).nonzero(as_tuple=True)
        mask[self.rows[page], head, self.columns[page, head, slot]] = True
        return mask

    def write(self, widths: torch.Tensor, bits: torch.Tensor) -> None:
        """Write the bits of each page, `(n,)`, to its tokens, in `(B, H, T)`."""
        page, head, slot = (self.columns >= 0).nonzero(as_tuple=True)
        widths[self.rows[page], head, self.columns[page, head, slot]] = bits[page].to(widths.dtype)

    def sums(self, amounts: torch.Tensor) -> torch.Tensor:
        """Return the sum of `(B, H, T)` over the tokens of each page, `(n,)`."""
        page, head, slot = (self.columns >= 0).nonzero(as_tuple=True)
        picked = amounts[self.rows[page], head, self.columns[page, head, slot]]
        return torch.zeros(len(self.rows), dtype=amounts.dtype, device=amounts.device).index_add_(0, page, picked)


def competing(
    pages: Sequence[StoredPages], losses: Sequence[torch.Tensor], needed: torch.Tensor, cost: PageCost
) -> tuple[PackedPages, torch.Tensor]:
    """Return the pages of all layers, one layer after the other, with what is lost with each, and in fewer bits.

    Parameters
    ----------
    pages : sequence of StoredPages
        Of L layers.
    losses : sequence of torch.Tensor
        `(B, H, T)` of each, what evicting a token costs.
    needed : torch.Tensor
        `(L, B, H, T)` bool, tokens whose pages may not go.
    cost : PageCost
        Of pages in the widths that may be given.

    Returns
    -------
    tuple of PackedPages, torch.Tensor
        n pages; and `(n, W)` uint8, the bits that each choice stands for, :data:`FULL` to stay as it is.
    """
    evicted = torch.cat([mine.sums(loss.double()) for mine, loss in zip(pages, losses, strict=True)])
    never = torch.cat([mine.sums(each.double()) > 0 for mine, each in zip(pages, needed, strict=True)])
    nbytes, bits = (torch.cat([getattr(mine, name) for mine in pages]) for name in ("nbytes", "widths"))
    known = [EVICTED, *sorted(cost.nbytes)]
    choices, lost, prices = [], [], []
    for number, width in enumerate(known):
        stays = (bits <= width) | (number == len(known) - 1)
        narrow = torch.full_like(bits, width)
        choices.append(narrow.where(~stays, FULL))
        lost.append(evicted * _rates(bits.where(stays, narrow)))
        prices.append(nbytes.where(stays, cost.nbytes.get(width, 0)))
    packed = PackedPages(torch.stack(lost, dim=1), torch.stack(prices, dim=1), never)
    return packed, torch.stack(choices, dim=1).to(torch.uint8)


def _rates(bits: torch.Tensor) -> torch.Tensor:
    """Return the share of the loss of evicting that so many bits lose, `(n,)` float64."""
    rates = torch.zeros(bits.shape, dtype=torch.float64, device=bits.device)
    for width, rate in WIDTH_LOSS.items():
        rates[bits == width] = rate
    return rates
