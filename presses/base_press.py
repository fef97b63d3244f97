"""What this project's presses share: budgets, observed queries, and handing decisions to any cache."""

import logging
import weakref
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import QuantizedCache, StaticCache

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_of_call
from pikv_hf.integration.attachment import attach
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.mask_columns import new_tokens_valid
from pikv_hf.presses.expert_routing import is_routed, unwatch_routers
from pikv_hf.presses.observed_queries import check_has_keys, is_watched, unwatch, watch
from pikv_hf.presses.press_base import ScorerPress
from pikv_hf.presses.press_budget import Given, PressBudget
from pikv_hf.presses.press_calls import finds_a_cache

logger = logging.getLogger(__name__)


@dataclass
class LayerView:
    """One layer of a cache at the end of a call, as presses see it.

    Attributes
    ----------
    module : nn.Module
        Its attention.
    layer : Any
        A layer of a `PiKVCache` or of another cache of transformers.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)` by column; zeros where nothing is stored.
    stored : torch.Tensor
        `(B, H, T)` bool: neither padding nor evicted.
    padded : bool
        Whether rows have padding.
    """

    module: nn.Module
    layer: Any
    keys: torch.Tensor
    values: torch.Tensor
    stored: torch.Tensor
    padded: bool = False

    @property
    def index(self) -> int:
        """The model layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def is_paged(self) -> bool:
        """Whether the layer can evict each head's own tokens and free them."""
        return isinstance(self.layer, PiKVLayer) and self.layer.attachment is not None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of one KV head as the model makes it."""
        return (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()


@dataclass
class ObservingPress(ScorerPress):
    """Base of the presses: scores tokens by observed queries, and keeps the best within a budget.

    Usable on a `DynamicCache` or a :class:`~pikv_hf.PiKVCache`, alone or within kvpress's wrappers. On an attached
    `PiKVCache` each head keeps its own tokens and the others are freed; their positions stay what they are.

    Parameters
    ----------
    compression_ratio : float
        Share of the tokens to remove, in [0, 1), as kvpress has it.
    budget : float, int or str, optional
        Instead of it, what to keep: `0.25` or `"25%"`, `512` tokens per KV head, `"64 MiB"` for all layers; sliding
        layers, which are bounded as they are, come on top. Wrappers of kvpress that only ask a press for scores know
        ratios and shares, nothing else.
    sink_tokens : int
        First tokens of each sequence that always survive.
    compression_interval : int, optional
        Decide again during generation, whenever so many more tokens have been seen, on a `PiKVCache`; sooner where that
        is more than a quarter of the budget. What is decided leaves room for the tokens until then, so that the budget
        holds after every step. By default only prompts are compressed.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range, or both a ratio and a budget.
    """

    compression_ratio: float = 0.0
    budget: Given | None = None
    sink_tokens: int = 4
    compression_interval: int | None = None
    _budget: PressBudget | None = field(init=False, repr=False, default=None)
    _entered: int = field(init=False, repr=False, default=0)
    _eager: bool = field(init=False, repr=False, default=False)
    #: By layer, the tokens it had when it was decided and will have next time; one of a fork is decided at once.
    _decided: "weakref.WeakKeyDictionary[Any, tuple[int, int]]" = field(
        init=False, repr=False, compare=False, default_factory=weakref.WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"{name}: compression_ratio must be at least 0 and below 1, got {self.compression_ratio}")
        if self.budget is not None and self.compression_ratio:
            raise ValueError(
                f"{name}: give compression_ratio or budget, got {self.compression_ratio} and {self.budget!r}"
            )
        if self.sink_tokens < 0:
            raise ValueError(f"{name}: sink_tokens must be at least 0, got {self.sink_tokens}")
        interval = self.compression_interval
        if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int)):
            raise TypeError(f"{name}: compression_interval is a number of tokens, got {interval!r}")
        if interval is not None and interval < 1:
            raise ValueError(f"{name}: compression_interval must be at least 1 token, got {interval}")
        self._budget = None if self.budget is None else PressBudget.parse(self.budget)
        if self._budget is not None and self._budget.kind == "share":
            # A ratio is what kvpress's wrappers read and set.
            self.compression_ratio, self._budget = 1 - self._budget.amount, None

    # What subclasses decide

    @property
    def ragged(self) -> bool:
        """Whether layers keep different numbers of tokens, for which other caches than PiKV's have no mask."""
        return False

    def press_layer(self, view: LayerView, kwargs: dict[str, Any]) -> None:
        """Compress one layer after its attention has read a prompt or a part of it."""
        self.evict(view, self.chosen(view, self.token_scores(view, kwargs)))

    def token_scores(self, view: LayerView, kwargs: dict[str, Any] | None = None) -> torch.Tensor:
        """Return what each token is worth, `(B, H, T)`; `kwargs` are those of the attention's call."""
        known = {**(kwargs or {}), "pikv_stored": view.stored}
        # Presses here take queries from observers instead of hidden states.
        return self.score(view.module, None, view.keys, view.values, None, known)  # type: ignore[arg-type]

    # Budgets

    @property
    def removes(self) -> bool:
        """Whether the press removes anything."""
        return self._budget is not None or self.compression_ratio > 0

    def kept_shares(self, view: LayerView) -> list[float]:
        """Return the share of each row's tokens that the budget leaves of a layer, with room for those to come."""
        seen, shares = self.tokens_seen(view), self._shares(view)
        coming = self.interval(view) - 1
        rooms = [self.room(share, coming) / max(tokens, 1) for share, tokens in zip(shares, seen, strict=True)]
        return [min(1.0, max(0.0, share - room)) for share, room in zip(shares, rooms, strict=True)]

    def _shares(self, view: LayerView) -> list[float]:
        """Return the budget as a share of each row's tokens in a layer, which may be more than 1."""
        seen = self.tokens_seen(view)
        if self._budget is None:
            return [1 - self.compression_ratio] * len(seen)
        config: Any = view.module.config
        layers = int(config.get_text_config().num_hidden_layers)
        whole = layers * view.stored.shape[1] * sum(seen) * view.token_bytes
        return [self._budget.share(tokens, whole) for tokens in seen]

    def interval(self, view: LayerView) -> int:
        """Return how many tokens may come until a layer is decided again; 1 where only prompts are compressed."""
        if self.compression_interval is None:
            return 1
        held = [share * tokens for share, tokens in zip(self._shares(view), self.tokens_seen(view), strict=True)]
        return max(1, min(self.compression_interval, int(min(held) / 4)))

    def room(self, share: float, coming: int) -> float:
        """Return the tokens of room that as many to come need beside a share of those so far.

        A budget that is a share of the tokens grows with them.
        """
        return coming * (1 - share) if self._budget is None else coming

    def kept_tokens(self, tokens: int, share: float) -> int:
        """Return how many of a lane's `tokens` to keep: at least one, and the sinks."""
        # A share of 0.1 arrives as 0.09999999999999998.
        return min(tokens, max(1, self.sink_tokens, int(tokens * share + 1e-6)))

    def chosen(self, view: LayerView, scores: torch.Tensor) -> torch.Tensor:
        """Return the best tokens of each lane, `(B, H, T)` bool.

        Of a row with padding the share is of its own tokens. What was evicted before counts as seen: in a prompt that
        comes in chunks the share is of all tokens so far.
        """
        scores = self.guarded(scores, view.stored)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        kept = map(self.kept_tokens, self.tokens_seen(view), self.kept_shares(view))
        counts = torch.tensor(list(kept), device=scores.device)
        return (rank < counts.view(-1, 1, 1)) & view.stored

    def tokens_seen(self, view: LayerView) -> list[int]:
        """Return how many real tokens each row has had, evicted ones included."""
        layer = view.layer
        if isinstance(layer, PiKVLayer):
            return [view.stored.shape[-1] - padding for padding in layer.store.padding()]
        return view.stored.any(dim=1).sum(dim=-1).tolist()

    def guarded(self, scores: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Return scores by which sinks come first and what is not stored last."""
        rank = stored.any(dim=1, keepdim=True).cumsum(dim=-1)
        scores = scores.float().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)
        return scores.masked_fill(rank <= self.sink_tokens, torch.inf).masked_fill(~stored, -torch.inf)

    # Handing decisions to a cache

    def evict(self, view: LayerView, kept: torch.Tensor) -> None:
        """Keep `(B, H, T)` of a layer.

        Another cache than PiKV's can only drop tokens that all its lanes drop in equal number; where they differ the
        tokens are marked as kvpress's head-wise presses do, which hides them and frees nothing. Within a wrapper of
        kvpress, whose other presses take every column for a token, a `PiKVCache` is treated alike where that can be.
        """
        if bool((kept == view.stored).all()):
            return
        counts = kept.sum(dim=-1)
        even = not self.ragged and bool((counts == counts[0, 0]).all()) and bool(view.stored.all())
        if view.is_paged and (self._entered or not even):
            view.layer.keep(kept)
            return
        if view.padded:
            raise ValueError(
                f"layer {view.index}: rows of this batch are padded, and {type(view.layer).__name__} cannot hold rows "
                "of different lengths; use PiKVCache.for_model(model)"
            )
        if even:
            index = kept.nonzero()[:, 2].view(*kept.shape[:2], -1, 1)
            keys = view.keys.gather(2, index.expand(-1, -1, -1, view.keys.shape[-1]))
            view.layer.keys, view.layer.values = (
                keys.contiguous(),
                view.values.gather(2, index.expand(-1, -1, -1, view.values.shape[-1])).contiguous(),
            )
            return
        if self._eager:
            raise ValueError(
                f"layer {view.index}: {type(self).__name__} keeps different numbers of tokens by head or layer, which "
                f"in a {type(view.layer).__name__} can only be hidden, and not from attn_implementation='eager'; use "
                "another one, or PiKVCache.for_model(model)"
            )
        marks = (~kept).nonzero(as_tuple=True)
        logger.warning_once(  # type: ignore[attr-defined]
            f"{type(self).__name__}: heads or layers keep different numbers of tokens, which "
            f"{type(view.layer).__name__} cannot free; PiKVCache.for_model(model) does"
        )
        view.module.masked_key_indices = marks  # type: ignore[assignment]

    # The protocol of kvpress

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model and observe its queries; called by kvpress for presses within others as well."""
        watch(model)

    def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Compress the layer of the cache that this attention has just filled; single tokens are generated ones."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else input[0]
        cache = cache_of_call(kwargs)
        if cache is None or (hidden.shape[1] < 2 and self.compression_interval is None):
            return output
        layer = cache.layers[module.layer_idx]
        since, until = self._decided.get(layer, (0, 0))
        # Fewer than before: the cache was cropped or reset.
        if hidden.shape[1] < 2 and since <= layer.get_seq_length() < until:
            return output
        if not self.removes or getattr(layer, "is_sliding", False) or getattr(module, "sliding_window", None):
            if isinstance(layer, PiKVLayer):
                layer.edits.end_press()
            return output
        if isinstance(cache, QuantizedCache | StaticCache):
            raise ValueError(
                f"{type(self).__name__} cannot take tokens from a {type(cache).__name__}, only from a DynamicCache or "
                "a PiKVCache, which can quantise as well"
            )
        view = view_of(module, layer, kwargs, hidden.shape[1])
        if self.compression_interval is not None and not view.is_paged:
            raise ValueError(
                f"{type(self).__name__}: compression_interval={self.compression_interval} decides while tokens are "
                f"generated, when a {type(layer).__name__} no longer knows their positions; use "
                "PiKVCache.for_model(model)"
            )
        self.press_layer(view, kwargs)
        self.done(view, self.interval(view))
        return output

    def done(self, view: LayerView, interval: int) -> None:
        """Let a layer that has waited for the press go on; it is decided again when `interval` more have come."""
        if self.compression_interval is not None:
            seen = view.stored.shape[-1]
            self._decided[view.layer] = seen, seen + interval
        if view.is_paged:
            view.layer.edits.end_press()

    @contextmanager
    def __call__(self, model: Any) -> Generator[None, None, None]:
        """Compress what the model reads within the block: prompts, whole or in chunks.

        Raises
        ------
        RuntimeError
            At the end of a block in which the model was called, and no attention with a cache.
        """
        with ExitStack() as stack:
            self._entered += 1
            stack.callback(self.leave)
            self._eager = getattr(model.config, "_attn_implementation", None) == "eager"
            attachment = stack.enter_context(attach(model, "hash"))
            modules, made = attachment.attention_modules(), attachment.caches_made
            check_has_keys(modules)
            stack.callback(lambda: attachment.stay() if attachment.caches_made > made else None)
            if not is_routed(modules):
                stack.callback(unwatch_routers, modules)
            if not is_watched(modules):
                stack.callback(unwatch, modules)
            self.post_init_from_model(model)
            for module in modules.values():
                for handle in self.hooks(module):
                    stack.callback(handle.remove)
            stack.enter_context(finds_a_cache(type(self).__name__, model, modules.values()))
            yield

    def leave(self) -> None:
        """End the block."""
        self._entered -= 1

    def hooks(self, module: nn.Module) -> Iterator[Any]:
        """Place the press's hooks on an attention module."""
        yield module.register_forward_pre_hook(delay_packing, with_kwargs=True)
        yield module.register_forward_hook(self.forward_hook, with_kwargs=True)


def delay_packing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Let a layer wait with packing its new tokens until the press has decided."""
    cache = cache_of_call(kwargs)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if isinstance(cache, PiKVCache) and hidden.shape[1] > 1:
        layer = cache.layers[module.layer_idx]
        if isinstance(layer, PiKVLayer):
            layer.edits.begin_press()


def view_of(module: nn.Module, layer: Any, kwargs: dict[str, Any], new: int) -> LayerView:
    """Return a layer as presses see it, after a call of `new` tokens per row."""
    keys, values = layer.keys, layer.values
    if isinstance(layer, PiKVLayer):
        return LayerView(module, layer, keys, values, layer.stored_mask(), any(layer.store.padding()))
    stored = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    valid = new_tokens_valid(kwargs.get("attention_mask"), new)
    if valid is not None:
        stored[:, :, -new:] &= valid[:, None]
    if keys.shape[2] > new and (marks := getattr(module, "masked_key_indices", None)) is not None:
        stored[tuple(marks)] = False
    return LayerView(module, layer, keys, values, stored, valid is not None)
