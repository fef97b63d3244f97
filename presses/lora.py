"""Low-rank keys and values."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.codecs import fit_basis
from pikv_hf.presses.base import LayerView, ObservingPress

logger = logging.getLogger(__name__)

#: Bytes per page that the host keeps, and per token for its position, of the store of a layer.
PAGE_BYTES, POSITION_BYTES = 37, 4


@dataclass
class LoRAPress(ObservingPress):
    """Keeps every token's keys and values as coefficients of a basis per KV head (PiKV's LoRA, arXiv 2508.06526).

    The basis is the best of its rank for the prompt's tokens in the least-squares sense (Eckart and Young, 1936). On a
    :class:`~pikv_hf.PiKVCache` the press sets the layer's codec to `"lowrank"`: factors are stored, attention works on
    them. On another cache tokens are projected, which shows what the rank does to answers and saves nothing. Sinks and
    recent tokens stay as they are.

    Parameters
    ----------
    compression_ratio, budget, sink_tokens
        As in :class:`ObservingPress`; a share is one of bytes, from which the rank follows, basis and exact tokens
        counted.
    rank : int, optional
        Instead of a budget, the rank of keys and of values.
    error : float, optional
        Instead of a budget, the relative root mean square error that no head's keys or values may exceed.
    recent_tokens : int
        Latest tokens that stay as they are, on other caches; a `PiKVCache` has its recent window.

    Raises
    ------
    ValueError
        For arguments out of range, more than one of ratio, budget, rank and error, and layers that already hold packed
        tokens.
    """

    rank: int | None = None
    error: float | None = None
    recent_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.error is not None and not 0 < self.error < 1:
            raise ValueError(f"error must be between 0 and 1, got {self.error}")
        given = {"compression_ratio": self.compression_ratio or None, "budget": self.budget}
        given |= {"rank": self.rank, "error": self.error}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1:
            raise ValueError(f"give one of compression_ratio, budget, rank and error, got {named}")

    @property
    def removes(self) -> bool:
        """Whether the press changes anything."""
        return super().removes or self.rank is not None or self.error is not None

    def press_layer(self, view: LayerView, kwargs: dict[str, Any]) -> None:
        """Set the layer's codec, or project its tokens."""
        if view.is_paged:
            if not view.layer.config.key_codec.startswith("lowrank"):
                rank = self.rank_for(view, view.layer.config.recent_window, view.layer.config.sink_tokens)
                view.layer.recode(key_codec="lowrank", value_codec="lowrank", rank=rank)
            return
        logger.warning_once(  # type: ignore[attr-defined]
            f"LoRAPress: {type(view.layer).__name__} stores every channel, so that the projection saves no byte; "
            "PiKVCache.for_model(model) stores factors"
        )
        rank = self.rank_for(view, self.recent_tokens, self.sink_tokens)
        far = self.far_tokens(view, self.recent_tokens, self.sink_tokens)
        view.layer.keys, view.layer.values = (
            torch.where(far[..., None], projected(part, far, rank), part) for part in (view.keys, view.values)
        )

    def far_tokens(self, view: LayerView, recent: int, sinks: int) -> torch.Tensor:
        """Return which tokens are neither sinks nor recent, `(B, H, T)` bool."""
        column = torch.arange(view.held.shape[-1], device=view.held.device)
        rank = view.held.any(dim=1, keepdim=True).cumsum(dim=-1)
        return view.held & (rank > sinks) & (column < view.held.shape[-1] - recent)

    def rank_for(self, view: LayerView, recent: int, sinks: int) -> int:
        """Return the rank that budget or error ask for."""
        most = max(view.keys.shape[-1], view.values.shape[-1])
        if self.rank is not None:
            return min(self.rank, most)
        far = self.far_tokens(view, recent, sinks)
        if self.error is not None:
            return max(rank_of_error(part, far, self.error) for part in (view.keys, view.values))
        heads, seen = view.held.shape[1], self.tokens_seen(view)
        coded = int(far[:, 0].sum())
        exact = (sum(seen) - coded) * heads * view.token_bytes
        wanted = sum(share * tokens for share, tokens in zip(self.kept_shares(view), seen, strict=True))
        budget = int(wanted * heads * view.token_bytes) - exact
        size = view.keys.element_size() * heads
        dims = view.keys.shape[-1] + view.values.shape[-1]
        per_rank = size * (2 * coded + dims)
        places = coded * (POSITION_BYTES + PAGE_BYTES / 32)
        return max(1, min(most, int((budget - places) / max(1, per_rank))))


def projected(tokens: torch.Tensor, which: torch.Tensor, rank: int) -> torch.Tensor:
    """Return tokens `(B, H, T, D)` in the span of the basis `rank` of those that count, `(B, H, T)` bool."""
    batch, heads, count, dim = tokens.shape
    counted = (tokens * which[..., None]).transpose(0, 1).reshape(heads, 1, batch * count, dim)
    basis = fit_basis(counted, min(rank, dim)).float()
    flat = tokens.transpose(0, 1).reshape(heads, batch * count, dim).float()
    result = torch.matmul(torch.matmul(flat, basis), basis.transpose(1, 2))
    return result.view(heads, batch, count, dim).transpose(0, 1).to(tokens.dtype)


def rank_of_error(tokens: torch.Tensor, which: torch.Tensor, error: float) -> int:
    """Return the least rank whose relative root mean square error on the tokens that count is within `error`."""
    heads = tokens.shape[1]
    flat = (tokens * which[..., None]).transpose(0, 1).reshape(heads, -1, tokens.shape[-1]).double()
    energy = torch.linalg.eigvalsh(torch.matmul(flat.transpose(1, 2), flat)).clamp_min(0)
    # Ascending: what is lost by leaving out the smallest n directions.
    lost = energy.cumsum(dim=-1) / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    dropped = (lost <= error**2).sum(dim=-1)
    return max(1, int((energy.shape[-1] - dropped).max()))
