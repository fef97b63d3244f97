"""LoRAPress: keys and values stored as coefficients of a low-rank basis."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from pikv_hf.codecs.codec import FIT_TOKENS_PER_DIM, fit_basis, is_lowrank
from pikv_hf.config import PiKVConfig
from pikv_hf.layer.layer_codecs import recode
from pikv_hf.presses.base_press import LayerView, ObservingPress

logger = logging.getLogger(__name__)

#: Bytes of a page on the host, and of a token's position, in the store of a layer.
PAGE_BYTES, TOKEN_BYTES = 37, 4


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
        counted. Of a prompt so short that these alone exceed it, or of the first part of a longer one, the share is
        that of what comes after.
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
        # A share has been turned into a ratio by now.
        if self.compression_interval is not None:
            raise ValueError(
                f"compression_interval={self.compression_interval}: what LoRAPress leaves behind is a codec, which "
                "codes generated tokens as well; leave it out"
            )
        given = {"compression_ratio": (self.budget is None and self.compression_ratio) or None, "budget": self.budget}
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
            config = view.layer.config
            if not is_lowrank(config.key_codec):
                far = self.far_tokens(view, config.recent_window, config.sink_tokens)
                rank = self.rank_for(view, far, exact_tokens(config, self.tokens_seen(view)), config.page_size)
                bases = [
                    basis_of(part, far, rank) if enough_for_basis(far, part.shape[-1]) else None
                    for part in (view.keys, view.values)
                ]
                recode(view.layer.store, *bases, key_codec="lowrank", value_codec="lowrank", rank=rank)
            return
        logger.warning_once(  # type: ignore[attr-defined]
            f"LoRAPress: {type(view.layer).__name__} stores every channel, so that the projection saves no byte; "
            "PiKVCache.for_model(model) stores factors"
        )
        far = self.far_tokens(view, self.recent_tokens, self.sink_tokens)
        rank = self.rank_for(view, far, int((~far & view.stored)[:, 0].sum()), 32)
        view.layer.keys, view.layer.values = (
            torch.where(far[..., None], projected(part, far, rank), part) for part in (view.keys, view.values)
        )

    def far_tokens(self, view: LayerView, recent: int, sinks: int) -> torch.Tensor:
        """Return which tokens are neither sinks nor recent, `(B, H, T)` bool."""
        column = torch.arange(view.stored.shape[-1], device=view.stored.device)
        rank = view.stored.any(dim=1, keepdim=True).cumsum(dim=-1)
        return view.stored & (rank > sinks) & (column < view.stored.shape[-1] - recent)

    def rank_for(self, view: LayerView, far: torch.Tensor, exact: int, page_size: int) -> int:
        """Return the rank that budget or error ask for, where there is room for `exact` tokens as they are."""
        most = max(view.keys.shape[-1], view.values.shape[-1])
        if self.rank is not None:
            return min(self.rank, most)
        if self.error is not None:
            # The first part of a prompt may be all recent: it still says what the rest is like.
            known = far if bool(far.any()) else view.stored
            return max(rank_of_error(part, known, self.error) for part in (view.keys, view.values))
        return max(1, min(most, self.rank_of_budget(view, int(far[:, 0].sum()), exact, page_size)))

    def rank_of_budget(self, view: LayerView, coded: int, exact: int, page_size: int) -> int:
        """Return the largest rank within the budget in bytes, not positive if there is none."""
        heads, seen = view.stored.shape[1], self.tokens_seen(view)
        wanted = sum(share * tokens for share, tokens in zip(self.kept_shares(view), seen, strict=True))
        bookkeeping = TOKEN_BYTES + PAGE_BYTES / page_size
        spare = (wanted - exact) * heads * view.token_bytes - (coded + exact) * bookkeeping
        dims = view.keys.shape[-1] + view.values.shape[-1]
        size = view.keys.element_size() * heads
        if coded and spare >= size * (2 * coded + dims):
            return int(spare / (size * (2 * coded + dims)))
        logger.warning_once(  # type: ignore[attr-defined]
            f"LoRAPress: pages for {exact} tokens as they are leave no room in a budget of {wanted:.0f} of "
            f"{sum(seen)}; it is that of what comes after them"
        )
        return int((wanted / max(1, sum(seen)) * heads * view.token_bytes - bookkeeping) / (2 * size))


def exact_tokens(config: PiKVConfig, seen: list[int]) -> int:
    """Return for how many tokens of rows of `seen` tokens a paged layer has pages that are not packed, at most.

    These hold sinks, window, and of every shard what does not fill a page yet.
    """
    sinks = -(-config.sink_tokens // config.page_size) * config.page_size
    pages = -(-config.recent_window // config.page_size) + 2 + config.num_shards
    return sum(min(tokens, sinks + pages * config.page_size) for tokens in seen)


def enough_for_basis(which: torch.Tensor, dim: int) -> bool:
    """Return whether so many tokens count, `(B, H, T)` bool, that a basis fitted to them says something of others."""
    return int(which[:, 0].sum()) >= FIT_TOKENS_PER_DIM * dim


def basis_of(tokens: torch.Tensor, which: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the basis `(H, D, rank)` of those tokens `(B, H, T, D)` that count, `(B, H, T)` bool."""
    counted = (tokens * which[..., None]).transpose(0, 1).flatten(1, 2).unsqueeze(1)
    return fit_basis(counted, min(rank, tokens.shape[-1]))


def projected(tokens: torch.Tensor, which: torch.Tensor, rank: int) -> torch.Tensor:
    """Return tokens `(B, H, T, D)` in the span of the basis `rank` of those that count, `(B, H, T)` bool."""
    batch, heads, count, dim = tokens.shape
    basis = basis_of(tokens, which, rank).float()
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
