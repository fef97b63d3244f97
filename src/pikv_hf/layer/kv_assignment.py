"""K/V assigned from outside, as kvpress does: what was handed out before, and what becomes of what comes back."""

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..common.kv import KV
from ..common.tensors import detached
from ..page_table.compaction import ExactTokens
from ..page_table.equal_rows import equal_rows
from ..page_table.page_table import PageTable
from .input_checks import KVFormat, admit
from .layer_reads import dense_keys
from .layer_store import LayerStore
from .model_link import ModelLink
from .table_rebuild import TableRebuild


class KVAssignment:
    """An assignment of keys and values under way, and the dense tensors that it may be a slice of.

    Attributes
    ----------
    staged : torch.Tensor or None
        Keys that were assigned; values may still come, until the layer is used.
    """

    def __init__(self) -> None:
        self.staged: torch.Tensor | None = None
        self._handed_out: dict[KV, HandedOut] = {}

    def hand_out(self, which: KV, dense: torch.Tensor) -> torch.Tensor:
        """Remember that the layer has given away its keys or values, and return them."""
        self._handed_out[which] = HandedOut(dense)
        return dense

    def forget(self) -> None:
        """Forget what was handed out, since the layer's tokens have changed."""
        self._handed_out = {}

    def take_staged(self) -> torch.Tensor | None:
        """Return the keys that were assigned, once."""
        staged, self.staged = self.staged, None
        return staged

    def is_crop(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Return whether keys and values are the first tokens of what was handed out, unchanged."""
        given = {KV.KEYS: keys, KV.VALUES: values}
        known = self._handed_out
        return all(which in known and known[which].is_prefix(tensor) for which, tensor in given.items())


class HandedOut:
    """A dense tensor that a layer has given away, remembered without keeping it alive.

    A slice of it that comes back is a shorter cache, whose tokens need not be stored again. Only a slice of the very
    memory, unwritten since, counts: equal numbers elsewhere would have to be compared one by one.

    Parameters
    ----------
    tensor : torch.Tensor
        `(B, H, T, D)`.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = tensor.stride(), tensor.storage_offset()
        self._shape = tensor.shape
        self._version = _version(tensor)

    def is_prefix(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is `handed_out[:, :, :n]`, unchanged."""
        batch, heads, tokens, dim = self._shape
        return (
            self._version is not None
            and _version(tensor) == self._version
            and tensor.shape[2] <= tokens
            and tensor.shape == (batch, heads, tensor.shape[2], dim)
            and (tensor.stride(), tensor.storage_offset()) == self._layout
            # As long as this reference lives, the address is not given to another storage.
            and StorageWeakRef(tensor.untyped_storage()).cdata == self._storage.cdata
        )


def begins_with(dense: Iterable[torch.Tensor], keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether the first tokens of dense K/V are these, which torch says nobody has written into.

    It does not know of what was written through `.data` or NumPy. Decoding the same codes twice may differ a little.
    """
    tokens = keys.shape[2]
    return all(_is_close(given, there[:, :, :tokens]) for given, there in zip((keys, values), dense, strict=True))


def _is_close(given: torch.Tensor, there: torch.Tensor) -> bool:
    if torch.equal(given, there) or not given.numel():
        return True
    error = 16 * torch.finfo(there.dtype).eps * float(there.abs().max())
    return torch.allclose(given, there, rtol=0, atol=error, equal_nan=True)


def assign_tokens(store: LayerStore, keys: torch.Tensor, values: torch.Tensor, may_be_picked: bool) -> None:
    """Replace all tokens of a layer: it counts the new ones 0..T-1.

    Parameters
    ----------
    store : LayerStore
        Of the layer.
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)`, which fit the layer.
    may_be_picked : bool
        Whether keys that were only picked from the old ones go on to be rotated by their old positions, in which case
        the model's positions go on after the last one.

    Raises
    ------
    ValueError
        If rows of the batch are padded; nothing has changed then.
    """
    if store.is_padded:
        raise ValueError(
            f"layer {store.layer_idx}: K/V of {keys.shape[2]} tokens per row were assigned, but rows of this batch "
            "are padded, so a press has taken padding for tokens. Wrap it: pikv_hf.presses.RowwisePress(press)"
        )
    with store.transaction():
        store.begin_if_empty(KVFormat.of(keys, values))
        _replace_tokens(store, keys, values, may_be_picked)


def _replace_tokens(store: LayerStore, keys: torch.Tensor, values: torch.Tensor, may_be_picked: bool) -> None:
    """Give the layer the tokens of :func:`assign_tokens`, which are fine."""
    state, positions = store.state, store.state.positions_seen
    picked = may_be_picked and keys.shape[2] <= state.seen and is_selection(keys, dense_keys(store))
    stored = keys.new_ones(keys.shape[:3], dtype=torch.bool)
    if state.evicted:
        # What was evicted was handed out as zeros, and comes back as such: it is no token now either.
        stored = (keys != 0).any(dim=-1) | (values != 0).any(dim=-1)
    tables = replaced_tables(store, ExactTokens(keys, values, stored))
    store.drop_pending()
    store.replace_tables(tables)
    for part in store.parts:
        if part.scheduler is not None:
            # Columns are numbered anew.
            part.scheduler.recall = None
    state.evicted = state.evicted and not bool(stored.all())
    state.seen = state.assigned = keys.shape[2]
    state.dropped = positions - state.seen if picked else 0
    store.note_evictions()


def replaced_tables(store: LayerStore, tokens: ExactTokens) -> list[PageTable]:
    """Return a table of each part for tokens of all columns, within a transaction; the old ones stay as they are."""
    stored = tokens.stored
    leaders = equal_rows([tokens.keys[:, :, -1:]], [tokens.keys, tokens.values])
    # Where the tokens' experts were known they are not any more: they are spread over the shards page by page.
    split = not torch.equal(stored, stored[:, :1].expand_as(stored))
    rebuild = TableRebuild(store.config, store.shard_of(), store.shard_map, leaders, split)
    tables = []
    for part, own in zip(store.parts, store.own_tokens(stored), strict=True):
        mine = stored if own is None else stored & own
        table = part.assigned_table(ExactTokens(tokens.keys, tokens.values, mine), rebuild)
        part.fit(table, store.heads // table.plain.keys.shape[0], stored.shape[2])
        tables.append(table)
    if store.shard_map is not None:
        store.shard_map.rescale(0)
        store.shard_map.add_evenly(float(stored.sum()) / store.heads)
    return tables


def check_assignable(store: LayerStore) -> None:
    """Raise `ValueError` where tokens have more than keys and values."""
    if store.indexer_dim:
        raise ValueError(
            f"layer {store.layer_idx}: K/V cannot be assigned where each token has an indexer key, which would not be "
            "theirs"
        )


def check_assigned(
    store: LayerStore, kv_format: KVFormat | None, link: ModelLink | None, keys: object, values: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is assigned to a layer as keys and values, refused unless they are tensors that fit it.

    Raises
    ------
    TypeError, ValueError
        For other objects, layers with an indexer, and as :func:`~pikv_hf.layer.input_checks.admit`.
    """
    check_assignable(store)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        raise TypeError(f"layer {store.layer_idx}: expected tensors of keys and values, got {type(values).__name__}")
    keys, values = admit(store.layer_idx, keys, values, kv_format, link)
    return detached(keys), detached(values)


def _version(tensor: torch.Tensor) -> int | None:
    # Tensors made in inference mode do not count their changes.
    return None if tensor.is_inference() else tensor._version


def is_selection(keys: torch.Tensor, old_keys: torch.Tensor) -> bool:
    """Return whether keys were only picked from the old ones, so that their rotations are still those of old positions.

    Channels may have been set to zero, as ThinK does: of all tokens, or of some where none was left out. Keys that were
    rotated to new positions are no selection.

    Parameters
    ----------
    keys, old_keys : torch.Tensor
        `(B, H, n, D)` and `(B, H, T, D)`.
    """
    if keys.shape == old_keys.shape and bool(((keys == old_keys) | (keys == 0)).all()):
        return True
    empty = (keys == 0).all(dim=2, keepdim=True)
    if bool(empty.all(dim=-1).any()):
        return False
    new, old = (token_hashes(part.masked_fill(empty, 0)).contiguous() for part in (keys, old_keys))
    known = old.sort(dim=-1).values
    nearest = torch.searchsorted(known, new).clamp_max_(known.shape[-1] - 1)
    return bool((known.gather(-1, nearest) == new).all())


def token_hashes(tokens: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit number per token, `(B, H, T)`, equal for equal bits."""
    words = tokens.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tokens.element_size()])
    generator = torch.Generator().manual_seed(0x5EED)
    factors = torch.randint(-(2**62), 2**62, (words.shape[-1],), generator=generator).to(words.device) | 1
    return (words.long() * factors).sum(dim=-1)
