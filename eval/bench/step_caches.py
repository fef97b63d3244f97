"""Caches for `pikv bench steps`, filled with random K/V layer by layer: reading 131,072 tokens would take minutes.

What is synthetic: keys and values are normal, experts are drawn evenly, and the attention that PiKVPress goes by is
drawn from log-normal distributions, one spread for each KV head: some heads look up few tokens, others all. Everything
after it is the press's own: what losing a token costs behind the output projection, outsized tokens, the allocation of
widths under the budget.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.allocation.eviction_loss import eviction_loss, value_distance
from pikv_hf.allocation.output_projection import gram_of
from pikv_hf.presses.base_press import LayerView
from pikv_hf.presses.pikv_press import PiKVPress

from ..errors import InputError
from .decode import fill_layer
from .press_prefill import dense_bytes

#: Caches of all tokens, and the options of those that are PiKV's.
WHOLE: dict[str, dict[str, Any] | None] = {
    "dynamic": None,
    "exact": {},
    "int8": {"key_codec": "int8", "value_codec": "int8"},
    "int4": {"key_codec": "int4", "value_codec": "int4"},
}
#: Caches of a share: `press` of the bytes, by PiKVPress; `kept` of the tokens, evenly, on a `DynamicCache`.
SHARES = ("press", "kept")

#: The least and the most that the logarithm of attention spreads in a head.
SPREADS = (0.5, 4.0)


@dataclass(frozen=True)
class Prompt:
    """Random K/V of a prompt.

    Attributes
    ----------
    layers : list of tuple
        Keys and values of each layer, `(B, H, T, D)` float32.
    valid : torch.Tensor or None
        `(B, T)` bool, False for padding, which is on the left; None if there is none.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    valid: torch.Tensor | None = None

    @classmethod
    def drawn(cls, config: Any, rows: int, tokens: int, ragged: bool) -> "Prompt":
        """Draw a prompt for a model of this configuration; ragged rows have from a quarter of the tokens to all."""
        shape = rows, config.num_key_value_heads, tokens, config.head_dim
        layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
        if not ragged:
            return cls(layers)
        lengths = torch.linspace(max(1, tokens // 4), tokens, rows).long()
        return cls(layers, torch.arange(tokens) >= tokens - lengths.unsqueeze(1))


@dataclass
class DrawnPress(PiKVPress):
    """PiKVPress by attention that is drawn instead of observed; `given` counts the tokens of each width."""

    given: torch.Tensor = field(init=False, default_factory=lambda: torch.zeros(17, dtype=torch.int64))

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
        valid = kwargs["pikv_stored"].any(dim=1)
        spread = torch.empty(values.shape[:2]).uniform_(*SPREADS).unsqueeze(-1)
        probability = (torch.randn(values.shape[:3]) * spread).exp()
        config: Any = module.config
        distance = value_distance(values, gram_of(module, config.num_attention_heads, values.shape[-1]), valid=valid)
        return eviction_loss(probability, distance, smoothing=self.smoothing, valid=valid)

    def _store(self, view: LayerView, widths: torch.Tensor) -> None:
        self.given += torch.bincount(widths[view.stored].flatten().long(), minlength=17)
        super()._store(view, widths)

    def shares(self) -> dict[str, float]:
        """Return the share of tokens of each width that was given, in bits."""
        return {str(width): int(count) / int(self.given.sum()) for width, count in enumerate(self.given) if count}


def check_cache(name: str) -> None:
    """Raise `InputError` unless this is the name of a cache: `exact`, say, or `press:0.25`."""
    kind, _, share = name.partition(":")
    if name in WHOLE or (kind in SHARES and _is_share(share)):
        return
    known = ", ".join([*WHOLE, *(f"{each}:SHARE" for each in SHARES)])
    raise InputError(f"--cache must be one of {known}, with a share of at most 1, got {name!r}")


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def filled(name: str, model: Any, prompt: Prompt) -> tuple[Any, dict[str, float] | None]:
    """Return the cache of this name with a prompt in it, and the shares of tokens that a press gave each width."""
    kind, _, share = name.partition(":")
    if kind in ("dynamic", "kept"):
        return _dense(model, prompt, float(share or 1)), None
    cache = empty(kind, model)
    for layer, (keys, values) in zip(cache.layers, prompt.layers, strict=True):
        fill_layer(layer, keys, values, prompt.valid)
    if kind != "press":
        return cache, None
    press = DrawnPress(compression_ratio=1 - float(share))
    press.press_layers([_view(model, cache, prompt, index) for index in range(len(cache.layers))])
    return cache, press.shares()


def empty(kind: str, model: Any) -> Any:
    """Return an empty cache of a model: PiKV's, which attaches it, or a `DynamicCache`."""
    if kind in ("dynamic", "kept"):
        return DynamicCache(config=model.config)
    placement = "expert" if hasattr(model.config, "num_experts") else "hash"
    return PiKVCache.for_model(model, placement=placement, **(WHOLE.get(kind) or {}))


def _dense(model: Any, prompt: Prompt, share: float) -> DynamicCache:
    """Return a `DynamicCache` of the newest tokens; which ones makes no difference to its time."""
    cache = DynamicCache(config=model.config)
    for index, kv in enumerate(prompt.layers):
        kept = max(1, round(share * kv[0].shape[2]))
        keys, values = (part[:, :, -kept:] for part in kv)
        cache.update(keys, values, index)
    return cache


def _view(model: Any, cache: PiKVCache, prompt: Prompt, index: int) -> LayerView:
    keys, values = prompt.layers[index]
    valid = torch.ones(keys.shape[:3], dtype=torch.bool)
    if prompt.valid is not None:
        valid = valid & prompt.valid[:, None]
    return LayerView(model.model.layers[index].self_attn, cache.layers[index], keys, values, valid)


def bytes_of(cache: Any) -> int:
    """Return the live bytes of a cache."""
    return cache.nbytes if isinstance(cache, PiKVCache) else dense_bytes(cache)
