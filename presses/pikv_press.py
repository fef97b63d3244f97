"""PiKVPress: eviction and widths of all tokens of all heads of all layers, under one byte budget."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pikv_hf.common.foreign_attributes import GRAM_ATTRIBUTE
from pikv_hf.kernels import decode_pages, encode_pages
from pikv_hf.kernels.page_codes import Kind
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.presses.base_press import LayerView
from pikv_hf.presses.bit_allocation import EVICTED, FULL, PageCost, allocate, pages_nbytes
from pikv_hf.presses.earlier_chunks import Earlier
from pikv_hf.presses.eviction_loss import SMOOTHING, WIDTH_LOSS, eviction_loss, output_gram, value_distance
from pikv_hf.presses.joint_press import JointPress
from pikv_hf.presses.observed_queries import attention_mass, observed

logger = logging.getLogger(__name__)

#: Bytes of a layer that no page accounts for: the empty pools' bookkeeping.
LAYER_BYTES = 512

#: Tokens whose key or value is so many times longer than the lane's median have int8 pages of their own, or stay in
#: full precision: a page's ranges are those of its tokens, and one such token would take its neighbours' bits.
OUTSIZED, HUGE = 8.0, 64.0


@dataclass
class PiKVPress(JointPress):
    """Gives every token of every KV head a width, full, int8, int4, int2 or none, under one byte budget.

    What evicting a token costs is estimated by :func:`~pikv_hf.presses.eviction_loss.eviction_loss`: the attention that
    it can expect, half by what the latest queries paid and half spread evenly, times how far its value is from the mean
    of its head behind the output projection. That is in units of the residual stream, which heads and layers share:
    heads that look nothing up get few bytes without a prior. Storing a token in fewer bits costs a share of losing it.
    Reverse water-filling, as in RDKV (arXiv 2605.08317), then gives bytes where they save most. No question has to be
    known.

    On an attached :class:`~pikv_hf.PiKVCache` the widths are stored and everything else is freed. On another cache the
    tokens go through the same codes and the evicted ones are hidden: same answers, nothing saved.

    Parameters
    ----------
    compression_ratio, budget, sink_tokens
        As in :class:`ObservingPress`; the share is one of bytes: of what `DynamicCache` holds in the model's dtype.
    smoothing : float
        Share of the expected attention that is spread evenly.
    widths : tuple of int
        Bits that may be given beside 0.

    Raises
    ------
    ValueError
        For arguments out of range, and for budgets in bytes that do not hold the sinks in the narrowest width. A share
        of a prompt that is shorter than its pages is exceeded by these instead.
    """

    smoothing: float = SMOOTHING
    widths: tuple[int, ...] = (2, 4, 8, FULL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be between 0 and 1, got {self.smoothing}")
        known = {2, 4, 8, FULL}
        if not self.widths or set(self.widths) - known:
            raise ValueError(f"widths must be among {sorted(known)}, got {self.widths}")

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return what evicting each token would cost, `(B, H, T)` float32."""
        observer, stored = observed(module), kwargs.get("pikv_stored")
        assert observer.recent is not None
        valid = None if stored is None else stored.any(dim=1)
        causal = keys.shape[2] == observer.seen
        probability = attention_mass(observer, observer.recent, keys, stored, causal)
        gram = gram_of(module, observer.recent.queries.shape[1], values.shape[-1])
        distance = value_distance(values, gram, valid=valid)
        return eviction_loss(probability, distance, smoothing=self.smoothing, valid=valid)

    def press_layers(self, views: list[LayerView]) -> None:
        """Divide the budget over all layers and store what it leaves."""
        losses = [self.token_scores(view) for view in views]
        for group in same_shape(views):
            self._press_group([views[i] for i in group], [losses[i] for i in group], len(views))

    def _press_group(self, views: list[LayerView], losses: list[torch.Tensor], layers: int) -> None:
        view = views[0]
        priced = PageCost.of_pages(
            page_size_of(view), view.keys.shape[-1], view.values.shape[-1], view.keys.element_size()
        )
        cost = PageCost(priced.page_size, {width: priced.nbytes[width] for width in self.widths})
        budget = self._bytes_for(views, layers)
        earlier = Earlier.of(views, losses, self.sink_tokens, budget)
        left = budget - earlier.nbytes
        fresh = torch.stack([view.stored for view in views]) & ~earlier.inside
        apart = torch.stack([outsized(view) for view in views]) * fresh
        if pages_nbytes(apart, priced) > left // 2:
            # So many are not outsized but common.
            apart = torch.zeros_like(apart)
        left -= pages_nbytes(apart, priced)
        fresh &= apart == 0
        evicted = torch.stack(losses)
        rates = {EVICTED: 1.0, **{width: WIDTH_LOSS.get(width, 0.0) for width in self.widths}}
        curve = {width: (evicted * rate).where(fresh, 0) for width, rate in rates.items()}
        sinks = 0 if earlier.nbytes else self.sink_tokens
        if self._budget is None or self._budget.kind != "bytes":
            # A share of a short prompt may be less than a page of each head.
            left = max(left, least_bytes(fresh, cost, sinks))
        widths = allocate(curve, cost, left, sinks=sinks, valid=fresh) + apart
        for view, given, stays in zip(views, widths, earlier.kept, strict=True):
            self._store(view, given.where(~stays, FULL))

    def _bytes_for(self, views: list[LayerView], layers: int) -> int:
        batch, heads, tokens = views[0].stored.shape
        seen = sum(self.tokens_seen(views[0])) * heads
        whole = sum(view.token_bytes for view in views) * seen
        if self._budget is None:
            share = 1 - self.compression_ratio
        else:
            share = self._budget.share(tokens, layers * views[0].token_bytes * batch * heads * tokens)
        return max(0, int(whole * share) - LAYER_BYTES * len(views))

    def _store(self, view: LayerView, widths: torch.Tensor) -> None:
        if view.is_paged:
            view.layer.keep(widths.to(torch.uint8))
            return
        logger.warning_once(  # type: ignore[attr-defined]
            f"PiKVPress: {type(view.layer).__name__} stores every token as it is; widths only change what attention "
            "sees, and no byte is saved. PiKVCache.for_model(model) stores them"
        )
        keys, values = (rounded(part, widths, keys=name) for part, name in ((view.keys, True), (view.values, False)))
        view.layer.keys, view.layer.values = keys, values
        self.evict(LayerView(view.module, view.layer, keys, values, view.stored), (widths > 0) & view.stored)


def outsized(view: LayerView) -> torch.Tensor:
    """Return the widths of tokens that would spoil their page's ranges, `(B, H, T)` int8; 0 for all others."""
    widths = torch.zeros_like(view.stored, dtype=torch.int8)
    for part in (view.keys, view.values):
        length = part.float().norm(dim=-1)
        usual = length.masked_fill(~view.stored, torch.nan).nanmedian(dim=-1, keepdim=True).values
        widths = torch.maximum(widths, 8 * (length > OUTSIZED * usual).to(torch.int8))
        widths = torch.maximum(widths, FULL * (length > HUGE * usual).to(torch.int8))
    return widths


def least_bytes(stored: torch.Tensor, cost: PageCost, sinks: int) -> int:
    """Return the bytes of every lane's sinks, or one token, in the narrowest pages; `stored` is `(..., T)` bool."""
    tokens = stored.sum(dim=-1).clamp(max=max(1, sinks))
    return int(((tokens + cost.page_size - 1) // cost.page_size).sum()) * min(cost.nbytes.values())


def gram_of(module: nn.Module, query_heads: int, value_dim: int) -> torch.Tensor:
    """Return `(Hq, Dv, Dv)`, how the output projection measures a head's output; the identity if there is none."""
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != query_heads * value_dim:
        device = next(module.parameters()).device
        return torch.eye(value_dim, device=device).expand(query_heads, -1, -1)
    known = getattr(module, GRAM_ATTRIBUTE, None)
    # Computed once per weight; training it further changes the version.
    if known is None or known[0] != (weight.data_ptr(), weight._version):
        known = (weight.data_ptr(), weight._version), output_gram(weight.detach(), query_heads)
        setattr(module, GRAM_ATTRIBUTE, known)
    return known[1]


def page_size_of(view: LayerView) -> int:
    """Return the tokens per page of a paged layer, and the default for others."""
    return view.layer.config.page_size if isinstance(view.layer, PiKVLayer) else 32


def same_shape(views: list[LayerView]) -> list[list[int]]:
    """Group layers whose K/V have the same sizes: a budget is divided within each, in proportion to its bytes."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, view in enumerate(views):
        groups.setdefault((*view.keys.shape, view.values.shape[-1]), []).append(index)
    return list(groups.values())


def rounded(tokens: torch.Tensor, widths: torch.Tensor, *, keys: bool, page_size: int = 32) -> torch.Tensor:
    """Return tokens `(B, H, T, D)` as their widths would store them, grouped into pages lane by lane."""
    flat, lanes = tokens.flatten(0, 1).clone(), widths.flatten(0, 1)
    for width in {2, 4, 8} & set(torch.unique(lanes).tolist()):
        kind: Kind = f"int{width}"  # type: ignore[assignment]
        for lane in range(len(flat)):
            index = (lanes[lane] == width).nonzero().squeeze(1)
            if not len(index):
                continue
            padded = torch.nn.functional.pad(index, (0, -len(index) % page_size))
            padded[len(index) :] = index[-1]
            pages = flat[lane][padded].view(1, -1, page_size, flat.shape[-1])
            opened = decode_pages(encode_pages(pages, kind, keys=keys), flat.dtype).view(-1, flat.shape[-1])
            flat[lane][index] = opened[: len(index)]
    return flat.view_as(tokens)
