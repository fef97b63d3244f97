"""Reading what a layer stores: dense K/V, which columns hold a token, and the tensors that take memory."""

import torch

from ..common.kv import KV
from .layer_store import LayerStore
from .pending_tokens import PendingTokens


def dense_keys(store: LayerStore) -> torch.Tensor:
    """Return all keys by column, `(B, H, T, D)`; zeros for padding and what was evicted."""
    return _with_pending(store, KV.KEYS, None if store.pending is None else store.pending.keys)


def dense_values(store: LayerStore) -> torch.Tensor:
    """Return all values by column, `(B, H, T, Dv)`; zeros for padding and what was evicted."""
    values = _with_pending(store, KV.VALUES, None if store.pending is None else store.pending.values)
    return values[..., : values.shape[-1] - store.indexer_width]


def dense_latents(store: LayerStore, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `before` latents and rotary keys by column, `(B, 1, n, R)` and `(B, 1, n, Dr)`, as stored."""
    return dense_keys(store)[:, :, :before], dense_values(store)[:, :, :before]


def indexer_keys(store: LayerStore) -> torch.Tensor:
    """Return the indexer's keys by column, `(B, T, Di)`, of a layer that stores them; zeros for padding."""
    values = _with_pending(store, KV.VALUES, None if store.pending is None else store.pending.values)
    shares = values[..., values.shape[-1] - store.indexer_width :]
    return shares.transpose(1, 2).flatten(2)[..., : store.indexer_dim]


def check_not_evicted(store: LayerStore) -> None:
    """Raise `RuntimeError` if tokens were evicted: other attention would take the zeros in their place for tokens."""
    if store.state.evicted:
        raise RuntimeError(
            f"layer {store.layer_idx}: tokens were evicted, which only attn_implementation='pikv' can pass "
            "over, but this layer's attention is another one or does not see the cache"
        )


def dense_history(store: LayerStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dense keys and values for an attention that is not PiKV's; refused as :func:`check_not_evicted` does."""
    check_not_evicted(store)
    return dense_keys(store), dense_values(store)


def with_history(
    past: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new K/V after a dense history, `(B, H, T, D)` and `(B, H, T, Dv)`; gradients reach the new ones."""
    return torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)


def _with_pending(store: LayerStore, which: KV, new: torch.Tensor | None) -> torch.Tensor:
    if new is not None and not store.stored:
        return new
    past = _dense_stored(store, which)
    return past if new is None else torch.cat([past, new], dim=2)


def _dense_stored(store: LayerStore, which: KV) -> torch.Tensor:
    """Return what is stored, `(B, H, n, D)`. Every token is in one part, and zero in the others."""
    first, *others = store.tables()
    dense = first.view.dense_part(store.stored, which)
    for table in others:
        dense += table.view.dense_part(store.stored, which).to(dense.device)
    if store.layout.exchange is not None:
        dense = store.layout.exchange.total(dense)
    return dense.reshape(store.batch, store.heads, store.stored, dense.shape[-1])


def stored_mask(store: LayerStore) -> torch.Tensor:
    """Return `(B, H, T)` bool, which columns hold a token of a KV head: neither padding nor evicted."""
    if store.table is None:
        return torch.zeros((0, 0, 0), dtype=torch.bool)
    first, *others = store.tables()
    mask = first.view.stored_mask(store.stored)
    for table in others:
        mask |= table.view.stored_mask(store.stored).to(mask.device)
    if store.layout.exchange is not None:
        mask = store.layout.exchange.total(mask)
    mask = mask.view(store.batch, store.lanes, store.stored).expand(-1, store.heads, -1)
    if store.pending is None:
        return mask.clone()
    return torch.cat([mask, _pending_mask(store, store.pending)], dim=2)


def _pending_mask(store: LayerStore, pending: PendingTokens) -> torch.Tensor:
    """Return `(B, H, Q)` bool, which of the pending columns hold a token."""
    mask = torch.ones((store.batch, store.heads, pending.tokens), dtype=torch.bool, device=store.device)
    if pending.valid is not None:
        mask &= pending.valid[:, None]
    return mask


def storages(store: LayerStore, part: int | None = None) -> list[torch.Tensor]:
    """Return the tensors that take the memory of one of the parts, or of all; what is pending is the first's."""
    tensors = []
    for each in store.parts if part is None else [store.parts[part]]:
        tensors += [] if each.table is None else each.table.pools.tensors()
        tensors += [] if each.scheduler is None else each.scheduler.tensors()
    pending = store.pending
    return tensors if pending is None or part else [*tensors, pending.keys, pending.values]
