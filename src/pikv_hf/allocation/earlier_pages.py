"""What was packed earlier goes or stays page by page, beside new tokens, and is never packed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bit_allocation import PackedPages
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

    def sums(self, amounts: torch.Tensor) -> torch.Tensor:
        """Return the sum of `(B, H, T)` over the tokens of each page, `(n,)`."""
        page, head, slot = (self.columns >= 0).nonzero(as_tuple=True)
        picked = amounts[self.rows[page], head, self.columns[page, head, slot]]
        return torch.zeros(len(self.rows), dtype=amounts.dtype, device=amounts.device).index_add_(0, page, picked)



def competing(pages: Sequence[StoredPages], losses: Sequence[torch.Tensor], needed: torch.Tensor) -> PackedPages:
    """Return the pages of all layers, one layer after the other, with what is lost with each.

    Parameters
    ----------
    pages : sequence of StoredPages
        Of L layers.
    losses : sequence of torch.Tensor
        `(B, H, T)` of each, what evicting a token costs.
    needed : torch.Tensor
        `(L, B, H, T)` bool, tokens whose pages may not go.
    """
    worth = []
    for mine, loss, never in zip(pages, losses, needed, strict=True):
        rounded = torch.tensor([WIDTH_LOSS.get(bits, 0.0) for bits in mine.widths.tolist()], device=loss.device)
        kept = mine.sums(loss) * (1 - rounded)
        worth.append(kept.masked_fill(mine.sums(never.float()) > 0, torch.inf))
    return PackedPages(torch.cat(worth), torch.cat([mine.nbytes for mine in pages]))
