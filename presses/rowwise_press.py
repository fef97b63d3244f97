"""Any press on a padded batch: row by row, each without its padding."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pikv_hf.common.transformers_release import cache_of_call, with_cache
from pikv_hf.layer.kv_assignment import token_hashes
from pikv_hf.presses.base_press import LayerView, ObservingPress, delay_packing, view_of
from pikv_hf.presses.press_base import BasePress, decoder_of
from pikv_hf.presses.press_calls import finds_a_cache


@dataclass
class RowwisePress(BasePress):
    """Runs a press of kvpress on each row alone, and keeps for each row what it kept.

    kvpress takes padding for tokens: rows of a padded batch get other tokens than they would alone. On a
    :class:`~pikv_hf.PiKVCache`, whose rows may have different lengths, each row's result here equals that of the row
    alone. Tokens keep their positions.

    Parameters
    ----------
    press : BasePress
        A press that picks tokens of a prompt, or marks them by head. Presses of this project need no wrapper.

    Raises
    ------
    TypeError
        For what is no press.
    ValueError
        For presses of this project; while reading, for presses that change tokens instead of picking some, and other
        caches with padded rows.
    """

    press: Any

    def __post_init__(self) -> None:
        if not isinstance(self.press, BasePress):
            raise TypeError(f"RowwisePress is around a press of kvpress, got {type(self.press).__name__}")
        if isinstance(self.press, ObservingPress):
            raise ValueError(f"{type(self.press).__name__} needs no RowwisePress: it tells padding from tokens")

    def post_init_from_model(self, model: Any) -> None:
        """Tell the press of the model."""
        self.press.post_init_from_model(model)

    @property
    def compression_ratio(self) -> float:
        """The press's own."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Compress each row of the prompt that this attention has just read."""
        cache = cache_of_call(kwargs)
        if cache is None:
            return output
        layer, new = cache.layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        if layer.get_seq_length() != new:
            return self.press.forward_hook(module, input, kwargs, output)
        view = view_of(module, layer, kwargs, new)
        if not view.padded:
            return self.press.forward_hook(module, input, kwargs, output)
        if not view.is_paged:
            raise ValueError(
                f"layer {view.index}: {type(layer).__name__} cannot hold rows of different lengths; use "
                "PiKVCache.for_model(model)"
            )
        kept = torch.zeros_like(view.stored)
        for row in range(len(kept)):
            columns = view.stored[row].any(dim=0).nonzero().squeeze(1)
            if len(columns):
                kept[row][:, columns] = self._kept_of_row(view, row, columns, kwargs, output)
        layer.keep(kept)
        return output

    def _kept_of_row(
        self, view: LayerView, row: int, columns: torch.Tensor, kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor:
        """Return which of a row's tokens the press keeps, `(H, n)` bool."""
        keys, values = (part[row : row + 1, :, columns].contiguous() for part in (view.keys, view.values))
        attentions = None if output[1] is None else output[1][row : row + 1][..., columns, :][..., columns]
        # Some presses write into what they are given: they get copies, in a cache of this row and layer alone.
        layer = SimpleNamespace(keys=keys.clone(), values=values.clone(), get_seq_length=lambda: len(columns))
        alone = with_cache(of_row(kwargs, row, columns), SimpleNamespace(layers={view.index: layer}))
        view.module.masked_key_indices = None  # type: ignore[assignment]
        self.press.forward_hook(view.module, [], alone, (output[0][row : row + 1, columns], attentions))
        marks: Any = view.module.masked_key_indices
        view.module.masked_key_indices = None  # type: ignore[assignment]
        kept = picked((keys, values), (layer.keys, layer.values), type(self.press).__name__)[0]
        if marks is not None:
            kept[marks[1], marks[2]] = False
        return kept

    @contextmanager
    def __call__(self, model: Any) -> Generator[None, None, None]:
        """Compress what is read within the block; layers wait with packing until the press has seen their tokens.

        Raises
        ------
        RuntimeError
            At the end of a block in which the model was called, and no attention with a cache.
        """
        modules = [layer.self_attn for layer in decoder_of(model).layers]
        handles = [module.register_forward_pre_hook(delay_packing, with_kwargs=True) for module in modules]
        try:
            with super().__call__(model), finds_a_cache(type(self).__name__, model, modules):
                yield
        finally:
            for handle in handles:
                handle.remove()


def of_row(kwargs: dict[str, Any], row: int, columns: torch.Tensor) -> dict[str, Any]:
    """Return an attention's arguments as they were if a row had come alone, without its padding."""
    alone = dict(kwargs)
    alone["hidden_states"] = kwargs["hidden_states"][row : row + 1, columns]
    alone["attention_mask"] = None
    if (embeddings := kwargs.get("position_embeddings")) is not None:
        alone["position_embeddings"] = tuple(
            (part if part.shape[0] == 1 else part[row : row + 1])[:, columns] for part in embeddings
        )
    if (positions := kwargs.get("position_ids")) is not None:
        alone["position_ids"] = (positions if positions.shape[0] == 1 else positions[row : row + 1])[:, columns]
    if (at := kwargs.get("cache_position")) is not None:
        alone["cache_position"] = at[: len(columns)]
    return alone


Pair = tuple[torch.Tensor, torch.Tensor]


def picked(tokens: Pair, chosen: Pair, press: str) -> torch.Tensor:
    """Return which tokens are among the chosen ones, `(B, H, T)` bool.

    Parameters
    ----------
    tokens, chosen : tuple of torch.Tensor
        Keys `(B, H, T, D)` and values `(B, H, T, Dv)`, and n of them.
    press : str
        For the message.

    Raises
    ------
    ValueError
        If a chosen token is none of them.
    """
    known, wanted = (token_hashes(keys) + 3 * token_hashes(values) for keys, values in (tokens, chosen))
    ordered, order = known.sort(dim=-1)
    place = torch.searchsorted(ordered, wanted.contiguous()).clamp_max_(known.shape[-1] - 1)
    if not bool((ordered.gather(-1, place) == wanted).all()):
        raise ValueError(f"{press} changes tokens instead of picking some, which no row of a padded batch can be given")
    return torch.zeros_like(known, dtype=torch.bool).scatter_(-1, order.gather(-1, place), True)
