"""The base classes of presses: kvpress's where it is installed, so that its wrappers take ours, else these two.

They do what kvpress's do, as far as presses here and a user's own need it, and give way to them.
"""

import importlib.util
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pikv_hf.common.transformers_release import cache_of_call


@dataclass
class BasePress:
    """Compresses each layer of a cache after its attention has read a prompt; subclasses write `compress`.

    The same as kvpress's class of this name, but for its `QuantizedCache`.
    """

    def post_init_from_model(self, model: Any) -> None:
        """Prepare for a model; called when the press is entered, also for presses within others."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is left of a layer's keys and values, `(B, H, n, D)`.

        Parameters
        ----------
        module : nn.Module
            The attention.
        hidden_states : torch.Tensor
            What it was called with, `(B, T, hidden)`.
        keys, values : torch.Tensor
            Of the cache, `(B, H, T, D)`.
        attentions : torch.Tensor, optional
            Its weights, `(B, Hq, T, T)`, in eager attention.
        kwargs : dict
            The arguments of its call.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compress()")

    def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Compress the layer of the cache that this attention has just filled, if it held nothing before."""
        hidden_states, layer = kwargs["hidden_states"], cache_of_call(kwargs).layers[module.layer_idx]
        if layer.get_seq_length() == hidden_states.shape[1]:
            layer.keys, layer.values = self.compress(module, hidden_states, layer.keys, layer.values, output[1], kwargs)
        return output

    @contextmanager
    def __call__(self, model: Any) -> Generator[None, None, None]:
        """Compress the prompts that the model reads within the block."""
        self.post_init_from_model(model)
        decoder = decoder_of(model)
        handles = []
        try:
            for layer in decoder.layers:
                layer.self_attn.rotary_emb = decoder.rotary_emb
                handles.append(layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class ScorerPress(BasePress):
    """Keeps the tokens of each KV head that `score` gives most; the same as kvpress's class of this name.

    Parameters
    ----------
    compression_ratio : float
        Share of the tokens to remove, in [0, 1).
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"compression_ratio must be at least 0 and below 1, got {self.compression_ratio}")

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return what each token is worth, `(B, H, T)`; arguments as those of `compress`."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values with the highest scores, in the order of their scores."""
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        index = scores.topk(kept, dim=-1).indices[..., None]
        chosen = (part.gather(2, index.expand(-1, -1, -1, part.shape[-1])).contiguous() for part in (keys, values))
        return next(chosen), next(chosen)


def decoder_of(model: Any) -> Any:
    """Return the module that has the decoder's layers, where kvpress looks for it."""
    return getattr(model.model, "language_model", model.model)


def _kvpress() -> Any:
    """Import kvpress if it is there; one that cannot be imported, as with a newer transformers, is passed over."""
    if importlib.util.find_spec("kvpress") is None:
        return None
    try:
        import kvpress
    except ImportError as error:
        warnings.warn(f"kvpress is installed and cannot be imported, so presses do without it: {error}", stacklevel=2)
        return None
    return kvpress


#: The package, None where it is not installed or cannot be imported.
KVPRESS: Any = _kvpress()

if KVPRESS is not None:
    BasePress, ScorerPress = KVPRESS.BasePress, KVPRESS.ScorerPress  # type: ignore[misc]
