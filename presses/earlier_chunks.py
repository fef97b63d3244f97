"""What an earlier part of a prompt left in pages: it goes or stays page by page, and is never packed again."""

from dataclasses import dataclass

import torch

from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.press_eviction import packed_pages
from pikv_hf.presses.base_press import LayerView


@dataclass(frozen=True, slots=True)
class Earlier:
    """Tokens that were stored by a press before.

    Attributes
    ----------
    inside : torch.Tensor
        `(L, B, H, T)` bool, the tokens in such pages.
    kept : torch.Tensor
        `(L, B, H, T)` bool, those of the pages that stay.
    nbytes : int
        Bytes of these.
    """

    inside: torch.Tensor
    kept: torch.Tensor
    nbytes: int

    @classmethod
    def of(cls, views: list[LayerView], losses: list[torch.Tensor], sinks: int, budget: int) -> "Earlier":
        """Choose pages within their part of a budget, which is that of their tokens among all that were read.

        Pages go in order of what losing them costs per byte; those with sinks stay.

        Parameters
        ----------
        views : list of LayerView
            L layers with K/V of equal sizes.
        losses : list of torch.Tensor
            `(B, H, T)` each, what evicting a token costs.
        sinks : int
            First tokens of each sequence that stay.
        budget : int
            Bytes for everything that was read.
        """
        inside = torch.zeros((len(views), *views[0].stored.shape), dtype=torch.bool, device=views[0].stored.device)
        kept = torch.zeros_like(inside)
        pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        worth, sizes, layers = [], [], []
        for index, (view, loss) in enumerate(zip(views, losses, strict=True)):
            rows, columns, nbytes = _pages_of(view)
            mark(inside[index], rows, columns)
            value = page_loss(loss, rows, columns)
            first = view.stored.any(dim=1, keepdim=True).cumsum(dim=-1) <= sinks
            value = value.masked_fill(page_loss((first & view.stored).float(), rows, columns) > 0, torch.inf)
            pages.append((rows, columns, nbytes))
            worth.append(value / nbytes)
            sizes.append(nbytes)
            layers.append(torch.full_like(nbytes, index))
        if not inside.any():
            return cls(inside, kept, 0)
        tokens = inside.shape[-1]
        read = int(inside.any(dim=0).any(dim=0).any(dim=0).nonzero().max()) + 1
        order = torch.cat(worth).argsort(descending=True, stable=True)
        spent = torch.cat(sizes)[order].cumsum(dim=0)
        needed = torch.cat(worth)[order] == torch.inf
        chosen = order[(spent <= budget * read // tokens) | needed]
        stays = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, chosen, True)
        for index, (rows, columns, _) in enumerate(pages):
            mine = stays[torch.cat(layers) == index]
            mark(kept[index], rows[mine], columns[mine])
        return cls(inside, kept, int(torch.cat(sizes)[stays].sum()))


def _pages_of(view: LayerView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if isinstance(view.layer, PiKVLayer) and view.is_paged:
        return packed_pages(view.layer.store)
    empty = torch.zeros(0, dtype=torch.int64, device=view.stored.device)
    return empty, empty.new_zeros((0, 1, 1)), empty


def mark(mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Set `(B, H, T)` to True at the tokens of pages: `(n,)` sequences, `(n, H, P)` columns or -1."""
    page, head, slot = (columns >= 0).nonzero(as_tuple=True)
    mask[rows[page], head, columns[page, head, slot]] = True


def page_loss(loss: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the sum of `(B, H, T)` over the tokens of each page, `(n,)`."""
    page, head, slot = (columns >= 0).nonzero(as_tuple=True)
    sums = torch.zeros(len(rows), dtype=loss.dtype, device=loss.device)
    return sums.index_add_(0, page, loss[rows[page], head, columns[page, head, slot]])
