"""How much attention each page took, and when: what scheduling knows of a page."""

import copy
from typing import Self

import numpy as np
import torch

from ..common.tensors import resized
from .types import PageIds

#: Steps after which a share of the attention counts half.
ATTENTION_HALF_LIFE = 64


class UsageCounters:
    """Attention statistics of the pages of a pool, kept on its device: nothing waits for it until a page must go.

    Parameters
    ----------
    device : torch.device
        Where they live.

    Attributes
    ----------
    shares : torch.Tensor
        `(2, N)` float32: shares of the attention summed over steps, and the same halved every
        `ATTENTION_HALF_LIFE` steps.
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

    def resized(self, pages: int, kept: PageIds, index: torch.Tensor | int) -> Self:
        """Return the statistics of a pool of so many pages, of which the first are those `kept` `(n,)`.

        `index` are the same numbers on the device, or n if these are `0..n-1`.
        """
        new = copy.copy(self)
        new.shares, new.steps = (resized(each, pages, 1, index) for each in (self.shares, self.steps))
        return new

    def snapshot(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`restore` needs."""
        return self.shares.clone(), self.steps.clone()

    def restore(self, known: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Forget what has changed since a :meth:`snapshot`; pages may have been added."""
        kept = min(known[0].shape[1], self.shares.shape[1])
        self.shares[:, :kept], self.steps[:, :kept] = (each[:, :kept] for each in known)

    def reset(self, ids: PageIds) -> None:
        """Begin anew with pages that get other tokens."""
        index = torch.from_numpy(np.ascontiguousarray(ids)).to(self.steps.device)
        self.shares[:, index] = 0
        self.steps[:2, index] = self.now
        self.steps[2, index] = -1
        self.steps[3, index] = 0

    def copy(self, page: int, new: int) -> None:
        """Let a copied page have the statistics of the page it is a copy of."""
        self.shares[:, new], self.steps[:, new] = self.shares[:, page], self.steps[:, page]

    def copy_from(self, other: "UsageCounters", source: torch.Tensor, index: torch.Tensor) -> None:
        """Give pages `index` the statistics of pages `source` of another pool, both `(n,)`."""
        self.shares[:, index] = other.shares[:, source].to(self.shares.device)
        self.steps[:, index] = other.steps[:, source].to(self.steps.device)

    def move_tokens(self, source: torch.Tensor, index: torch.Tensor, tokens: int, filled: torch.Tensor) -> None:
        """Follow tokens to other pages, each with its part of its page's attention and of the steps that this took.

        Parameters
        ----------
        source, index : torch.Tensor
            `(n,)`, the page of each token, and the page that it moved to.
        tokens : int
            Tokens in each page of `source`.
        filled : torch.Tensor
            `(n,)`, tokens in each page of `index`, these included.
        """
        self.shares.index_add_(1, index, self.shares[:, source] / tokens)
        born, last, _, uses = self.steps
        # A page is as old as its tokens are on average: shares are compared by what they were per step.
        earlier = (born[source] - born[index]).float() / filled
        born += torch.zeros_like(born, dtype=torch.float32).index_add_(0, index, earlier).round_().int()
        last[index] = last[index].where(uses[index] > 0, self.now)

    def attended(self, index: torch.Tensor) -> None:
        """Let pages `(n,)` filled in this step count from before it: their tokens have been attended to in it."""
        born, last, _, uses = self.steps
        new = born[index] == self.now
        last[index] -= (new & (uses[index] == 0) & (last[index] == self.now)).int()
        born[index] -= new.int()

    def begin_step(self, now: int) -> None:
        """Count a step; what came before it weighs less."""
        self.shares[1].mul_(0.5 ** ((now - self.now) / ATTENTION_HALF_LIFE))
        self.now = now

    def add(self, index: torch.Tensor, share: torch.Tensor) -> None:
        """Add shares of the attention `(n,)` to pages `(n,)`, which may repeat."""
        self.shares.index_add_(1, index, share.expand(2, -1))

    def use(self, index: torch.Tensor, hit: torch.Tensor) -> None:
        """Count a use in this step of the pages `(n,)` where `hit` `(n,)` bool, once however often it is said.

        No size depends on what was hit, so that a GPU is not waited for.
        """
        used = torch.zeros(self.steps.shape[1], dtype=torch.int32, device=hit.device)
        used = used.index_add_(0, index, hit.int()) > 0
        born, last, before, uses = self.steps
        new = used & ((uses == 0) | (last < self.now))
        before = before.where(~new, last.where(uses > 0, -1))
        self.steps = torch.stack([born, last.masked_fill(used, self.now), before, uses + new])
