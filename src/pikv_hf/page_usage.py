"""What scheduling knows of a page: how much attention it took, and when."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from .scheduling import HALF_LIFE

if TYPE_CHECKING:
    from .page_book import PageIds


class PageUsage:
    """Statistics of the pages of a pool, kept where the pages are: nothing waits for the device until a page must go.

    Parameters
    ----------
    device : torch.device
        Where they live.

    Attributes
    ----------
    shares : torch.Tensor
        `(2, N)` float32: shares of the attention summed over steps, and the same halved every `HALF_LIFE` steps.
    steps : torch.Tensor
        `(4, N)` int32: the step in which the page was filled, that of its last use, that of the use before (-1: none),
        and the number of uses.
    now : int
        Steps so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.shares = torch.zeros((2, 0), dtype=torch.float32, device=device)
        self.steps = torch.zeros((4, 0), dtype=torch.int32, device=device)
        self.now = 0

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""
        return [self.shares, self.steps]

    @property
    def host_bytes(self) -> int:
        """Bytes kept outside of tensors."""
        return 0

    def resize(self, pages: int) -> None:
        """Follow the pool to another number of pages."""
        kept = min(pages, self.shares.shape[1])
        for name in ("shares", "steps"):
            old = getattr(self, name)
            new = old.new_zeros((len(old), pages))
            new[:, :kept] = old[:, :kept]
            setattr(self, name, new)

    def reset(self, ids: "PageIds") -> None:
        """Begin anew with pages that get other tokens."""
        index = torch.from_numpy(np.ascontiguousarray(ids)).to(self.steps.device)
        self.shares[:, index] = 0
        self.steps[:2, index] = self.now
        self.steps[2, index] = -1
        self.steps[3, index] = 0

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the statistics of the page it is a copy of."""
        self.shares[:, new], self.steps[:, new] = self.shares[:, page], self.steps[:, page]

    def take(self, other: "PageUsage", source: torch.Tensor, index: torch.Tensor) -> None:
        """Take over the statistics of pages `source` of another pool for pages `index`, both `(n,)`."""
        self.shares[:, index] = other.shares[:, source]
        self.steps[:, index] = other.steps[:, source]

    def spread(self, source: torch.Tensor, index: torch.Tensor, tokens: int) -> None:
        """Give one token's part of the attention of pages of `tokens` tokens to the pages it moves to."""
        self.shares.index_add_(1, index, self.shares[:, source] / tokens)

    def begin_step(self, now: int) -> None:
        """Count a step; what came before it weighs less."""
        self.shares[1].mul_(0.5 ** ((now - self.now) / HALF_LIFE))
        self.now = now

    def add(self, index: torch.Tensor, share: torch.Tensor) -> None:
        """Add shares of the attention `(n,)` to pages `(n,)`, which may repeat."""
        self.shares.index_add_(1, index, share.expand(2, -1))

    def use(self, index: torch.Tensor) -> None:
        """Count a use in this step of distinct pages, `(n,)`."""
        used = self.steps[:, index]
        again = torch.stack([used[0], torch.full_like(used[1], self.now), used[1].where(used[3] > 0, -1), used[3] + 1])
        self.steps[:, index] = again
