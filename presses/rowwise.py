"""Any press on a padded batch: row by row, each without its padding."""

from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from torch import nn

from pikv_hf.assignment import token_hashes
from pikv_hf.presses.base import LayerView, hold, view_of


@dataclass
class RowwisePress(BasePress):
    """Runs a press of kvpress on each row alone, and keeps for each row what it kept.

    kvpress takes padding for tokens: rows of a padded batch get other tokens than they would alone. On a
    :class:`~pikv_hf.PiKVCache`, whose rows may have different lengths, each row's result here equals that of the row
    alone. Tokens keep their positions.

    Parameters
    ----------
    press : BasePress
        A press that picks tokens, or marks them by head. Presses of this project need no wrapper.

    Raises
    ------
    ValueError
        For presses that change tokens instead of picking some, and other caches with padded rows.
    """

    press: BasePress

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
        cache = kwargs["past_key_values"]
        layer, new = cache.layers[module.layer_idx], kwargs["hidden_states"].shape[1]
        view = view_of(module, layer, kwargs, new)
        padded = view.valid is not None
        if not padded or view.keys.shape[2] != new:
            return self.press.forward_hook(module, input, kwargs, output)
        if not view.is_paged:
            raise ValueError(
                f"layer {view.index}: {type(layer).__name__} cannot hold rows of different lengths; use "
                "PiKVCache.for_model(model)"
            )
        kept = torch.zeros_like(view.held)
        for row in range(len(kept)):
            columns = view.held[row].any(dim=0).nonzero().squeeze(1)
            if len(columns):
                kept[row][:, columns] = self._kept_of_row(view, row, columns, kwargs, output)
        layer.keep(kept)
        return output

    def _kept_of_row(
        self, view: LayerView, row: int, columns: torch.Tensor, kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor:
        """Return which of a row's tokens the press keeps, `(H, n)` bool."""
        keys, values = (part[row : row + 1, :, columns].contiguous() for part in (view.keys, view.values))
        alone = of_row(kwargs, row, columns)
        attentions = None if output[1] is None else output[1][row : row + 1][..., columns, :][..., columns]
        view.module.masked_key_indices = None  # type: ignore[assignment]
        new_keys, _ = self.press.compress(view.module, alone["hidden_states"], keys, values, attentions, alone)
        marks: Any = view.module.masked_key_indices
        view.module.masked_key_indices = None  # type: ignore[assignment]
        kept = picked(keys, new_keys, type(self.press).__name__)[0]
        if marks is not None:
            kept[marks[1], marks[2]] = False
        return kept

    def __call__(self, model: Any) -> Any:
        """Compress what is read within the block."""
        return _Holding(super().__call__(model), model)


class _Holding:
    """kvpress's context with layers that wait for the press."""

    def __init__(self, context: Any, model: Any) -> None:
        self._context, self._model = context, model
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._context.__enter__()
        base = getattr(self._model.model, "language_model", self._model.model)
        self._handles = [x.self_attn.register_forward_pre_hook(hold, with_kwargs=True) for x in base.layers]

    def __exit__(self, *error: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        return self._context.__exit__(*error)


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


def picked(keys: torch.Tensor, chosen: torch.Tensor, press: str) -> torch.Tensor:
    """Return which of the keys `(B, H, T, D)` are among the chosen `(B, H, n, D)`, `(B, H, T)` bool.

    Raises
    ------
    ValueError
        If a chosen key is none of them.
    """
    ordered, order = token_hashes(keys).sort(dim=-1)
    new = token_hashes(chosen).contiguous()
    place = torch.searchsorted(ordered, new).clamp_max_(keys.shape[2] - 1)
    if not bool((ordered.gather(-1, place) == new).all()):
        raise ValueError(
            f"{press} changes keys instead of picking some, which cannot be done by rows of a padded batch"
        )
    return torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device).scatter_(-1, order.gather(-1, place), True)
