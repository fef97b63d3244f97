"""Query-aware eviction: PiKV's utility of a token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pikv_hf.presses.base import ObservingPress
from pikv_hf.presses.observation import attention_mass, observed


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
        Latest queries whose attention counts, at most 64; their own tokens always survive.
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
        observer, held = observed(module), kwargs.get("pikv_held")
        assert observer.recent is not None
        count = len(observer.recent.positions)
        latest = observer.recent.pick(torch.arange(max(0, count - self.window), count, device=keys.device))
        whole = keys.shape[2] == observer.seen
        mass = attention_mass(observer, latest, keys, held, causal=whole)
        if self.pooling > 1:
            mass = torch.nn.functional.avg_pool1d(mass, self.pooling, stride=1, padding=self.pooling // 2)
        if self.value_norm:
            mass = mass * values.float().norm(dim=-1)
        if self.page_size is not None:
            mass = by_page(mass, self.page_size)
        if whole:
            recent = torch.arange(keys.shape[2], device=keys.device) >= observer.seen - min(self.window, count)
            mass = mass.masked_fill(recent, 2 * float(mass.max()) + 1)
        return mass


def by_page(scores: torch.Tensor, page_size: int) -> torch.Tensor:
    """Give every token of a page the page's mean score, `(B, H, T)`; pages begin at multiples of `page_size`."""
    tokens = scores.shape[-1]
    pages = torch.nn.functional.pad(scores, (0, -tokens % page_size)).unflatten(-1, (-1, page_size)).sum(dim=-1)
    sizes = torch.full((pages.shape[-1],), page_size, device=scores.device)
    sizes[-1] = tokens - page_size * (len(sizes) - 1)
    return (pages / sizes).repeat_interleave(page_size, dim=-1)[..., :tokens]
