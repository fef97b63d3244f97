"""PiKVPress: eviction and widths of all tokens of all heads of all layers, under one byte budget."""

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pikv_hf.allocation.bit_allocation import FULL
from pikv_hf.allocation.earlier_pages import StoredPages
from pikv_hf.allocation.eviction_loss import SMOOTHING
from pikv_hf.allocation.observed_queries import Observer
from pikv_hf.allocation.output_projection import gram_of
from pikv_hf.allocation.token_loss import token_loss
from pikv_hf.allocation.token_widths import LAYER_BYTES, LayerTokens, same_shape, token_widths
from pikv_hf.integration.attachment import attachment_of
from pikv_hf.kernels import decode_pages, encode_pages
from pikv_hf.kernels.page_codes import Kind
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.press_eviction import packed_pages
from pikv_hf.presses.base_press import LayerView
from pikv_hf.presses.joint_press import JointPress
from pikv_hf.presses.observed_queries import observed

logger = logging.getLogger(__name__)

#: Bytes, more than there are.
NO_LIMIT = 1 << 62


@dataclass
class PiKVPress(JointPress):
    """Gives every token of every KV head a width, full, int8, int4, int2 or none, under one byte budget.

    What evicting a token costs is estimated by :func:`~pikv_hf.allocation.recall.recall_mass`: the most attention that
    the prompt's own queries pay to it when they are moved behind the prompt, times how far its value is from the mean
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
    error_budget : float, optional
        Instead of a ratio or a budget: keep as few bytes as lose no more than this share, in (0, 1), of what evicting
        all tokens would, those of earlier calls included. Prompts differ in what they need: `docs/presses.md` says
        what shares gave.
    smoothing : float
        Where it is not known how a model's queries are moved, the attention that the latest ones paid stands in for
        what is recalled, :func:`~pikv_hf.allocation.eviction_loss.eviction_loss`; this share of it is spread evenly.
    widths : tuple of int
        Bits that may be given beside 0.

    Raises
    ------
    ValueError
        For arguments out of range, and for budgets in bytes that do not hold the sinks in the narrowest width. A share
        of a prompt that is shorter than its pages is exceeded by these instead.
    """

    error_budget: float | None = None
    smoothing: float = SMOOTHING
    widths: tuple[int, ...] = (2, 4, 8, FULL)
    #: By layer, what was lost with tokens that were evicted.
    _lost: "weakref.WeakKeyDictionary[Any, float]" = field(
        init=False, repr=False, compare=False, default_factory=weakref.WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error_budget is not None:
            if isinstance(self.error_budget, bool) or not isinstance(self.error_budget, int | float):
                raise TypeError(f"error_budget is a share between 0 and 1, got {self.error_budget!r}")
            if not 0 < self.error_budget < 1:
                raise ValueError(f"error_budget must be between 0 and 1, got {self.error_budget}")
            if self.budget is not None or self.compression_ratio or self.compression_interval is not None:
                raise ValueError(
                    f"error_budget={self.error_budget} says by itself how many bytes a prompt is worth; leave out "
                    "compression_ratio, budget and compression_interval"
                )
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be between 0 and 1, got {self.smoothing}")
        known = {2, 4, 8, FULL}
        if not self.widths or set(self.widths) - known:
            raise ValueError(f"widths must be among {sorted(known)}, got {self.widths}")

    @property
    def removes(self) -> bool:
        """Whether the press changes anything."""
        return super().removes or self.error_budget is not None

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model, and have it noted how well its tokens would be recalled."""
        super().post_init_from_model(model)
        attachment = attachment_of(model)
        assert attachment is not None
        for module in attachment.attention_modules().values():
            Observer.of(module).recalls = True

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
        observer = observed(module)
        assert observer.recent is not None
        gram = gram_of(module, observer.recent.queries.shape[1], values.shape[-1])
        recalled = observer.recall_of(keys) if kwargs.get("pikv_by_recall", True) else None
        if recalled is None and "pikv_by_recall" not in kwargs:
            _warn_of([module])
        stored = kwargs.get("pikv_stored")
        return token_loss(observer, gram, keys, values, stored, recalled, smoothing=self.smoothing)

    def _already_lost(self, views: list[LayerView]) -> float:
        """Return what earlier calls have evicted of the tokens of layers; a sequence that begins has lost nothing."""
        if all(view.stored.shape[-1] == Observer.of(view.module).new for view in views):
            for view in views:
                self._lost.pop(view.layer, None)
        return sum(self._lost.get(view.layer, 0.0) for view in views)

    def press_layers(self, views: list[LayerView]) -> None:
        """Divide the budget over all layers and store what it leaves."""
        unknown = [view.module for view in views if Observer.of(view.module).recall_of(view.keys) is None]
        if unknown:
            _warn_of(unknown)
        known = {"pikv_by_recall": not unknown}
        layers = [
            LayerTokens.of(view.keys, view.values, view.stored, self.token_scores(view, known), pages_of(view))
            for view in views
        ]
        for group in same_shape(layers):
            self._press_group([views[i] for i in group], [layers[i] for i in group], len(views))

    def _press_group(self, views: list[LayerView], group: list[LayerTokens], layers: int) -> None:
        enough = -math.inf
        if self.error_budget is not None:
            lost = self._already_lost(views)
            total = sum(float((each.loss * each.stored).sum(dtype=torch.float64)) for each in group)
            enough = max(0.0, self.error_budget * (total + lost) - lost)
        given = token_widths(
            group,
            self._bytes_for(views, layers),
            page_size_of(views[0]),
            widths=self.widths,
            sinks=self.sink_tokens,
            # A share of a short prompt may be less than a page of each head.
            may_exceed=self._budget is None or self._budget.kind != "bytes",
            enough=enough,
        )
        for view, widths, each in zip(views, given, group, strict=True):
            if self.error_budget is not None:
                gone = each.loss * (each.stored & (widths == 0))
                self._lost[view.layer] = self._lost.get(view.layer, 0.0) + float(gone.sum(dtype=torch.float64))
            self._store(view, widths)

    def _bytes_for(self, views: list[LayerView], layers: int) -> int:
        if self.error_budget is not None:
            return NO_LIMIT
        batch, heads, tokens = views[0].stored.shape
        seen = sum(self.tokens_seen(views[0])) * heads
        whole = sum(view.token_bytes for view in views) * seen
        if self._budget is None:
            share = 1 - self.compression_ratio
        else:
            share = self._budget.share(tokens, layers * views[0].token_bytes * batch * heads * tokens)
        page, coming = page_size_of(views[0]), min(self.interval(view) for view in views) - 1
        # Tokens to come fill pages of each head.
        room = -(-self.room(share, coming) // page) * page * batch * heads * sum(view.token_bytes for view in views)
        left = int(whole * share - room) - LAYER_BYTES * len(views)
        if room and left <= 0:
            said = (
                f"PiKVPress: {int(whole * share):,} bytes leave no room for the {int(room):,} of pages of tokens to "
                f"come (compression_interval={self.compression_interval})"
            )
            if self._budget is not None and self._budget.kind == "bytes":
                raise ValueError(said)
            logger.warning_once(f"{said}; the budget is exceeded")  # type: ignore[attr-defined]
            left = int(whole * share) // 2
        return max(0, left)

    def _store(self, view: LayerView, widths: torch.Tensor) -> None:
        if view.is_paged:
            view.layer.keep(widths)
            return
        logger.warning_once(  # type: ignore[attr-defined]
            f"PiKVPress: {type(view.layer).__name__} stores every token as it is; widths only change what attention "
            "sees, and no byte is saved. PiKVCache.for_model(model) stores them"
        )
        keys, values = (rounded(part, widths, keys=name) for part, name in ((view.keys, True), (view.values, False)))
        view.layer.keys, view.layer.values = keys, values
        self.evict(LayerView(view.module, view.layer, keys, values, view.stored), (widths > 0) & view.stored)


def _warn_of(modules: Sequence[nn.Module]) -> None:
    """Say once of which layers it is not known what would be recalled."""
    layers = ", ".join(str(getattr(module, "layer_idx", "?")) for module in modules)
    logger.warning_once(  # type: ignore[attr-defined]
        f"PiKVPress: what would be recalled is not known of {type(modules[0]).__name__} in layers {layers}; tokens are "
        "judged by the attention that the latest queries paid, those of other layers too"
    )


def pages_of(view: LayerView) -> StoredPages:
    """Return the pages that are packed already; other caches have none."""
    if isinstance(view.layer, PiKVLayer) and view.is_paged:
        return packed_pages(view.layer.store)
    return StoredPages.none(view.stored.device)


def page_size_of(view: LayerView) -> int:
    """Return the tokens per page of a paged layer, and the default for others."""
    return view.layer.config.page_size if isinstance(view.layer, PiKVLayer) else 32


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
