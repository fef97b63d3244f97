"""A layer whose attention reads only the tokens that an indexer of its own chooses (DeepSeek-V3.2, MiniMax-M3).

The indexer (DeepSeek-V3.2, arXiv 2512.02556) compares small queries with a small key of each token. These keys are
stored behind the values, as further channels of their heads: so whatever happens to a token, in pages, codecs, files or
copies, happens to both.
"""

import torch

from . import layer_reads
from .layer import PiKVLayer
from .layer_operation import layer_operation


class IndexedLayer(PiKVLayer):
    """The paged K/V, or latents, and indexer keys of one attention layer. Parameters are those of :class:`PiKVLayer`.

    A key of the indexer is divided among the layer's heads, behind whose values its parts lie, with zeros in the last
    part if it does not divide evenly.
    """

    #: Whether tokens came last from elsewhere than the model's attention, which no router will place.
    _is_outside = False

    def update_from_attention(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what :meth:`PiKVLayer.update_from_attention` does, and wait for the indexer's keys."""
        self._is_outside = False
        return super().update_from_attention(key_states, value_states)

    def update_from_outside(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what :meth:`PiKVLayer.update_from_outside` does, but wait for the indexer's keys."""
        self._is_outside = True
        return super().update_from_outside(keys, values)

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """The indexer's keys by column, `(B, T, Di)`, dense; None before the first update."""
        return None if self.table is None else self._indexer_keys()

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether there are pages for the indexer's keys."""
        return self.is_initialized

    @layer_operation
    def _indexer_keys(self) -> torch.Tensor:
        return layer_reads.indexer_keys(self.store)

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        """Do what :meth:`update_indexer` does, with keys `(B, 1, Q, Di)`, as MiniMax-M3 has them: `(B, 1, T, Di)`."""
        return self.update_indexer(idx_k.squeeze(1)).unsqueeze(1)

    @property
    def idx_keys(self) -> torch.Tensor | None:
        """The indexer's keys as MiniMax-M3 has them, `(B, 1, T, Di)`."""
        return None if (keys := self.indexer_keys) is None else keys.unsqueeze(1)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Store the indexer's keys of the tokens whose K/V have just come, and return those of all.

        Parameters
        ----------
        indexer_key_states : torch.Tensor
            `(B, Q, Di)`, of the dtype of the K/V.

        Returns
        -------
        torch.Tensor
            `(B, T, Di)`, by column; zeros for padding.

        Raises
        ------
        RuntimeError
            If no K/V wait for them.
        ValueError
            If they do not fit these, which are taken back then.
        """
        keys, pending = indexer_key_states, self.store.pending
        if pending is None or not pending.awaits_indexer:
            raise RuntimeError(f"layer {self.layer_idx}: indexer keys came before the K/V of their tokens, or twice")
        expected = (pending.keys.shape[0], pending.tokens, self.store.indexer_dim), self.dtype, self.device
        given = tuple(keys.shape), keys.dtype, keys.device
        if given != expected:
            self.rollback(pending.tokens)
            raise ValueError(
                f"layer {self.layer_idx}: got indexer keys {given[0]} in {given[1]} on {given[2]}, but K/V are for "
                f"{expected[0]} in {expected[1]} on {expected[2]}; DynamicCache takes them"
            )
        return self._index(keys)

    @layer_operation
    def _index(self, keys: torch.Tensor) -> torch.Tensor:
        pending = self.store.pending
        assert pending is not None
        width, heads = self.store.indexer_width, self.store.heads
        shares = torch.nn.functional.pad(keys.detach(), (0, width * heads - self.store.indexer_dim))
        pending.values[..., -width:] = shares.unflatten(2, (heads, width)).transpose(1, 2)
        pending.awaits_indexer = False
        every = layer_reads.indexer_keys(self.store)
        if self._is_outside:
            self.edits.settle()
        elif not self.state.reference_out and not self.has_expert_router:
            # Its attention does not come to say that it has read.
            self.edits.settle_soon()
        return every
