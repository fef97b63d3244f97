"""The reference by which attention finds a layer: on the K/V that `update` returns, if nothing copies these."""

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

    Attributes
    ----------
    code : object
        What ran in the layer's attention when tokens came last, None before.
    """

    def __init__(self, store: LayerStore, link: ModelLink | None) -> None:
        self._store, self._link = store, link
        self.code: Any = None

    def attends_with(self, code: Any) -> None:
        """Note what runs in the layer's attention. Where it has changed, nobody knows whether references reach PiKV's.

        All K/V are given out then, unless tokens were evicted, which other attention than PiKV's could not pass over.
        """
        if code is self.code:
            return
        state = self._store.state
        if self.code not in (None, code) and state.seen and not state.evicted:
            state.reference_lost = True
        self.code = code

    def is_expected(self) -> bool:
        """Return whether PiKV's attention will see what `update` returns."""
        state = self._store.state
        if self._link is None or not self._link.is_active(self._store.layer_idx):
            return False
        if state.reference_out:
            self.check_history_was_read()
        state.reference_lost |= state.reference_out
        return not state.reference_lost

    def check_history_was_read(self) -> None:
        """Raise `RuntimeError` if no attention has read what the last update referred to."""
        if self.is_unread:
            raise RuntimeError(
                f"layer {self._store.layer_idx}: no attention has read the history that the last update referred to. "
                "Either that call was interrupted, or something between update and attention copies the keys. Take the "
                "call's tokens back with cache.crop(length)"
            )

    @property
    def is_unread(self) -> bool:
        """Whether the last update referred to tokens stored before, and no attention has read them yet."""
        return self._store.state.reference_out and self._store.state.history_out

    def put_on(self, keys: torch.Tensor, values: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K/V that refer to the layer: views of their own, since the caller's tensors outlive the call."""
        keys, values = keys.view(keys.shape), values.view(values.shape)
        setattr(keys, LAYER_ATTRIBUTE, layer)
        setattr(values, LAYER_ATTRIBUTE, layer)
        return keys, values

    @staticmethod
    def on(keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Return the layer that K/V refer to, None if one of them is not what :meth:`put_on` has returned."""
        layer = getattr(keys, LAYER_ATTRIBUTE, None)
        return layer if layer is getattr(values, LAYER_ATTRIBUTE, None) else None

    def dense_reason(self) -> str | None:
        """Return why attention is given dense K/V, None if it reads the pages in place."""
        if self._link is None:
            return "the cache was made from a config alone"
        if not self._link.is_active(self._store.layer_idx):
            return f"the model's attention is {self._link.implementation(self._store.layer_idx)!r}"
        if self._store.state.reference_lost:
            return "the prompt's keys did not reach PiKV's attention: not attached, interrupted, or copied on their way"
        return None
