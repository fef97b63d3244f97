"""Query-aware eviction: PiKV's utility of a token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pikv_hf.allocation.observed_queries import attention_mass
from pikv_hf.presses.base_press import ObservingPress
from pikv_hf.presses.observed_queries import observed


@dataclass
class QueryAwarePress(ObservingPress):
    """Keeps the tokens of the highest utility: attention mass of observed queries, recency and value norm.

    The utility score of PiKV (arXiv 2508.06526, on scheduling) with what a cache can know at the end of a prompt. The
    attention mass is that of the queries which attention really used, the latest ones as in SnapKV
    (arXiv 2404.14469), smoothed over neighbours; weighing it by the value's norm follows VATP (arXiv 2406.12335).

    Parameters
    ----------
    compression_ratio, budget, sink_tokens
        As in :class:`ObservingPress`.
    window : int
        Latest queries whose attention counts, at most 64; their own tokens come before all others, the latest first.
    pooling : int
        Odd width of the average over neighbouring tokens, 1 for none.
    value_norm : bool
        Whether mass is weighed by the norm of the value.
    page_size : int, optional
        Keep or evict whole groups of so many neighbouring tokens, scored by their sum.

    Raises
    ------
    ValueError
        For arguments out of range.
    """

    window: int = 32
    pooling: int = 5
    value_norm: bool = True
    page_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= 64:
            raise ValueError(f"window must be between 1 and 64 queries, got {self.window}")
        if self.pooling < 1 or self.pooling % 2 == 0:
            raise ValueError(f"pooling must be odd and at least 1, got {self.pooling}")
        if self.page_size is not None and self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return utilities `(B, H, T)`; the latest tokens have the highest."""
        mass, recent = self.utility(module, keys, values, kwargs)
        return self.ranked(mass, recent, kwargs.get("pikv_stored"))

    def utility(
        self, module: nn.Module, keys: torch.Tensor, values: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the utility of each token, `(B, H, T)`, and which are those of the latest queries, `(T,)` bool."""
        observer = observed(module, kwargs)
        assert observer.recent is not None
        count = len(observer.recent.positions)
        latest = observer.recent.pick(torch.arange(max(0, count - self.window), count, device=keys.device))
        # Else these are some of the tokens, and which is not known.
        whole = keys.shape[2] == observer.seen
        mass = attention_mass(observer, latest, keys, kwargs.get("pikv_stored"), causal=whole)
        if self.pooling > 1:
            mass = torch.nn.functional.avg_pool1d(mass, self.pooling, stride=1, padding=self.pooling // 2)
        if self.value_norm:
            mass = mass * values.float().norm(dim=-1)
        column = torch.arange(keys.shape[2], device=keys.device)
        return mass, (column >= observer.seen - min(self.window, count)) & whole

    def ranked(self, worth: torch.Tensor, recent: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
        """Return what tokens are worth, `(B, H, T)` and not negative, by page if asked for, the latest tokens first."""
        if self.page_size is not None:
            stored = torch.ones_like(worth, dtype=torch.bool) if stored is None else stored
            worth = by_page(worth, self.page_size, stored)
        if not worth.numel():
            return worth
        latest = torch.linspace(1, 2, worth.shape[-1], device=worth.device)
        return torch.where(recent, 2 * float(worth.max()) + latest, worth)


def by_page(scores: torch.Tensor, page_size: int, stored: torch.Tensor) -> torch.Tensor:
    """Give every token of a page the mean score of those that are stored.

    Parameters
    ----------
    scores : torch.Tensor
        `(B, H, T)`.
    page_size : int
        Pages begin at multiples of it, counted from each row's first token.
    stored : torch.Tensor
        `(B, H, T)` bool, False for padding and what was evicted.

    Returns
    -------
    torch.Tensor
        `(B, H, T)`.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    first = stored.any(dim=1).int().argmax(dim=-1, keepdim=True)
    page = ((column - first).clamp_min(0) // page_size)[:, None].expand_as(scores)
    counted = stored.to(scores)
    totals = torch.zeros_like(scores).scatter_add_(-1, page, scores * counted)
    sizes = torch.zeros_like(scores).scatter_add_(-1, page, counted)
    return (totals / sizes.clamp_min(1)).gather(-1, page)
