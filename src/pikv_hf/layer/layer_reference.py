"""The reference by which attention finds a layer: on the keys that `update` returns, if nothing copies these."""

from typing import Any

import torch

from ..common.foreign_attributes import LAYER_ATTRIBUTE
from .layer_store import LayerStore
from .model_link import ModelLink


class LayerReference:
    """Knows whether the references of a layer reach PiKV's attention, which then reads the pages in place.

    Where one got lost the layer gives out dense K/V, with a reference as well: one that arrives says that the next call
    can be read in place again. What is known is in the layer's state, for forks and files.

    Parameters
    ----------
    store : LayerStore
        Of the layer.
    link : ModelLink, optional
        The attached model.
    """

    def __init__(self, store: LayerStore, link: ModelLink | None) -> None:
        self._store, self._link = store, link

    def is_expected(self) -> bool:
        """Return whether PiKV's attention will see what `update` returns."""
        if self._link is None or not self._link.is_active(self._store.layer_idx):
            return False
        self.check_history_was_read()
        state = self._store.state
        state.reference_lost |= state.reference_out
        return not state.reference_lost

    def check_history_was_read(self) -> None:
        """Raise `RuntimeError` if no attention has read what the last update referred to."""
        if self._store.state.reference_out and self._store.state.history_out:
            raise RuntimeError(
                f"layer {self._store.layer_idx}: no attention has read the history that the last update referred to. "
                "Either that call was interrupted, or something between update and attention copies the keys. Take the "
                "call's tokens back with cache.crop(length)"
            )

    def put_on(self, keys: torch.Tensor, layer: Any) -> torch.Tensor:
        """Return keys that refer to the layer: a view of their own, since the caller's tensor outlives the call."""
        keys = keys.view(keys.shape)
        setattr(keys, LAYER_ATTRIBUTE, layer)
        return keys

    def given_out(self, history: bool) -> None:
        """Note that new keys stand for the layer, with tokens stored before them or without."""
        self._store.state.reference_out, self._store.state.history_out = True, history

    def arrived(self) -> None:
        """Note that attention has found the layer."""
        self._store.state.reference_out = self._store.state.reference_lost = False

    def dense_reason(self) -> str | None:
        """Return why attention is given dense K/V, None if it reads the pages in place."""
        if self._link is None:
            return "the cache was made from a config alone"
        if not self._link.is_active(self._store.layer_idx):
            return f"the model's attention is {self._link.implementation(self._store.layer_idx)!r}"
        if self._store.state.reference_lost:
            return "the prompt's keys did not reach PiKV's attention: not attached, interrupted, or copied on their way"
        return None
