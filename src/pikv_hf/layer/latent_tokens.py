"""Latents in place of the keys and values that a model expands of them, as long as nothing tells heads apart.

A layer whose attention expands latents before it caches them stores the latents all the same: one head, and a fraction
of the bytes. Who asks for its keys and values gets them expanded. Where heads are to keep tokens of their own, and
where others than the attached model bring or read tokens, it stores what was expanded: from then on, until it is empty
again.
"""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..common.kv import KV
from ..page_table.compaction import ExactTokens
from .input_checks import KVFormat
from .kv_assignment import replaced_tables
from .layer_operation import layer_operation
from .layer_reads import dense_keys, dense_values, stored_mask
from .layer_store import LayerStore
from .model_link import Expansion, ModelLink
from .pending_tokens import PendingTokens


class LatentTokens:
    """The tokens of a layer as its model hands them over and expects them back, whatever the layer stores of them.

    Parameters
    ----------
    store : LayerStore
        The tokens, stored and pending.
    link : ModelLink, optional
        The attached model.
    """

    def __init__(self, store: LayerStore, link: ModelLink | None) -> None:
        self._store, self._link = store, link
        # Of the latents that are there: the model may get another projection.
        self._known: Expansion | None = None

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache and its forks."""
        return self._store.lock

    def go_on_from(self, other: "LatentTokens") -> None:
        """Take over how the latents of a layer that this is a copy of are expanded."""
        self._known = other._known

    def expansion(self) -> Expansion | None:
        """Return how what the layer stores is expanded, None if it stores keys and values as they come."""
        known = self._known
        if known is None and self._link is not None:
            known = self._link.latents.expansions.get(self._store.layer_idx)
        if known is None or (stored := self._store.kv_format()) is None or known.stored != stored.shape[1:]:
            return None
        if self._known is None:
            self._known = known.held()
        return self._known

    def kv_format(self) -> KVFormat | None:
        """Return what new K/V must be like, None while the layer is empty."""
        stored = self._store.kv_format()
        if stored is None or (expansion := self.expansion()) is None:
            return stored
        return stored._replace(shape=(stored.shape[0], *expansion.expanded))

    def dense_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values by column, `(B, H, T, D)` and `(B, H, T, Dv)`; zeros where there is no token."""
        keys, values = dense_keys(self._store), dense_values(self._store)
        return (keys, values) if (expansion := self.expansion()) is None else expansion.expand(keys, values)

    def dense(self, which: KV) -> torch.Tensor:
        """Return one of :meth:`dense_pair`."""
        if self.expansion() is None:
            return dense_keys(self._store) if which is KV.KEYS else dense_values(self._store)
        return self.dense_pair()[which is KV.VALUES]

    def stored_mask(self) -> torch.Tensor:
        """Return `(B, H, T)` bool, which columns hold a token of a KV head."""
        mask, expansion = stored_mask(self._store), self.expansion()
        return mask if expansion is None else mask.expand(-1, expansion.expanded[0], -1).clone()

    def of_call(self, keys: torch.Tensor, values: torch.Tensor, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what to store of the new K/V of the running attention: latents where that can be, else these.

        Parameters
        ----------
        keys, values : torch.Tensor
            `(B, H, Q, D)` and `(B, H, Q, Dv)`.
        in_place : bool
            Whether PiKV's attention will read what is stored.
        """
        store, link = self._store, self._link
        model = None if link is None else link.latents.expansions.get(store.layer_idx)
        if model is None:
            if self._known is not None:
                self.expand()
            return keys, values
        assert link is not None
        latents = link.latents.of_call(store.layer_idx, keys)
        # What is there may be expanded, or of a projection that the model had before.
        goes_on = not store.state.seen or (self.expansion() is not None and self._known in (None, model))
        if latents is None or not in_place or not goes_on:
            self.expand()
            return keys, values
        if not store.state.seen:
            self._known = model.held()
        elif self._known is not None:
            self._known.check_unchanged()
        return latents

    @layer_operation
    def expand(self) -> None:
        """Store keys and values of all heads from now on, of what is there too; tokens and columns stay as they are."""
        store, expansion = self._store, self.expansion()
        if expansion is None:
            return
        keys, values = self.dense_pair()
        mask, heads, stored = self.stored_mask(), store.heads, store.stored
        with store.transaction():
            try:
                store.heads = keys.shape[1]
                if stored:
                    tokens = ExactTokens(keys[:, :, :stored], values[:, :, :stored], mask[:, :, :stored])
                    store.replace_tables(replaced_tables(store, tokens))
                else:
                    store.begin(KVFormat.of(keys, values))
                if (new := store.pending) is not None:
                    store.pending = _expanded(new, keys[:, :, stored:], values[:, :, stored:])
                store.note_evictions()
            except BaseException:
                store.heads = heads
                raise
        self._known = None


def _expanded(pending: PendingTokens, keys: torch.Tensor, values: torch.Tensor) -> PendingTokens:
    """Return pending tokens with their keys and values instead of latents: all heads attend to them alike."""
    masses = None if pending.masses is None else pending.masses.expand(-1, keys.shape[1], -1)
    return dataclasses.replace(pending, keys=keys.contiguous(), values=values.contiguous(), masses=masses)
