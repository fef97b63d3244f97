"""What attention is told beside queries and pages: once for a call, and once for each piece of the pages."""

import dataclasses

import torch

from ..pages.page_pool import PagePool
from ..routing.page_router import PageRouter
from .attention_mass import AttentionMass

# (out, lse) of attention over a part of the keys, float32: `(..., M, Dv)` and `(..., M)`.
Partial = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionCall:
    """What holds for all pages that one call of a layer's attention reads.

    Attributes
    ----------
    scale : float
        Factor on the logits.
    softcap : float or None
        Logits become `softcap * tanh(logits / softcap)` before masking.
    seen : int
        Positions of the layer up to and including that of the newest query, for the router.
    page_router : PageRouter or None
        Chooses the full pages that are read; only where there is one query per row and no mask.
    masses : AttentionMass or None
        Told how much of the attention each page takes.
    absorbed : bool
        Whether tokens are those of latent attention; see :func:`pikv_hf.kernels.partial_attention`.
    columns : torch.Tensor or None
        `(B, 1 or H, k)` int64, the tokens that are read of full pages; None for all. A mask hides the others.
    """

    scale: float
    softcap: float | None = None
    seen: int = 0
    page_router: PageRouter | None = None
    masses: AttentionMass | None = None
    absorbed: bool = False
    columns: torch.Tensor | None = None

    def piece(
        self, bias: torch.Tensor | None, holes: torch.Tensor | None, page_lse: torch.Tensor | None
    ) -> "PieceArgs":
        """Return what the attention over one piece of the pages is told."""
        return PieceArgs(self.scale, self.softcap, bias, holes, page_lse, self.absorbed)

    def new_page_lse(self, lanes: int, queries: int, pages: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return `(lanes, queries, pages)` for the log-sum-exps of pages that a kernel writes; None if not wanted."""
        if self.masses is None:
            return None
        return torch.empty((lanes, queries, pages), dtype=torch.float32, device=like.device)

    def note_page_lse(
        self, pool: PagePool, rows: list[int] | None, pages: torch.Tensor, page_lse: torch.Tensor | None
    ) -> None:
        """Pass on what a kernel has written; see :meth:`AttentionMass.add`. `page_lse` is `(H, R, M, n)`."""
        if self.masses is not None and page_lse is not None:
            self.masses.add(pool, rows, pages, page_lse)


@dataclasses.dataclass(frozen=True, slots=True)
class PieceArgs:
    """What the attention over one piece of the pages is told; see :func:`pikv_hf.kernels.partial_attention`.

    Attributes
    ----------
    scale, softcap
        Those of the call.
    bias : torch.Tensor or None
        Added to the logits, broadcastable to `(lanes, M, T)`; `-inf` hides a key.
    holes : torch.Tensor or None
        `(n,)` int64, the slots among the T that hold no token.
    page_lse : torch.Tensor or None
        `(lanes, M, pages)` float32, written to: the log-sum-exp of each page alone.
    absorbed : bool
        That of the call.
    """

    scale: float
    softcap: float | None
    bias: torch.Tensor | None = None
    holes: torch.Tensor | None = None
    page_lse: torch.Tensor | None = None
    absorbed: bool = False

    def of_pages(self, start: int, pages: int, page_size: int) -> "PieceArgs":
        """Return what concerns only `pages` pages from the one at `start`."""
        slots = slice(start * page_size, (start + pages) * page_size)
        bias, holes = self.bias, self.holes
        if bias is not None and bias.shape[-1] > 1:
            bias = bias[..., slots]
        if holes is not None:
            holes = holes[(holes >= slots.start) & (holes < slots.stop)] - slots.start
        page_lse = None if self.page_lse is None else self.page_lse[..., start : start + pages]
        return PieceArgs(self.scale, self.softcap, bias, holes, page_lse, self.absorbed)

    def as_kernel_args(
        self,
    ) -> tuple[float, torch.Tensor | None, torch.Tensor | None, float | None, torch.Tensor | None, bool]:
        """Return the arguments that kernels take after queries, keys and values, in their order."""
        return self.scale, self.bias, self.holes, self.softcap, self.page_lse, self.absorbed
