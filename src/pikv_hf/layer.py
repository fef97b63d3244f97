"""One layer of the cache: the protocol that transformers speaks to it."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import CacheLayerMixin

from .config import PiKVConfig
from .pages import PagePool
from .placement import expert_placement, hash_placement
from .store import PageStore
from .table import PageTable
from .writer import SequenceWriter, ShardOf

if TYPE_CHECKING:
    from .attachment import Attachment

# The attribute of a returned key tensor by which the attention function finds the layer.
LAYER_ATTRIBUTE = "_pikv_layer"


# Queries kept of each KV head to judge the errors of packed keys by: of these newest positions, at most so many.
OBSERVED_POSITIONS, MAX_OBSERVED = 8, 64


@dataclasses.dataclass(slots=True)
class Pending:
    """The new K/V of a call with several tokens, until the layer's router has chosen their experts.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`, the model's own tensors.
    valid : torch.Tensor or None
        `(B, Q)` bool, False for padding; None if every token counts.
    vetted : bool
        Whether the attention function has said which tokens are padding.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None = None
    vetted: bool = False


Held = tuple[tuple[int, int, int, int], torch.dtype, torch.device]


def check_fits(layer_idx: int, keys: torch.Tensor, values: torch.Tensor, held: Held | None) -> None:
    """Raise unless new K/V are well-formed and fit what a layer holds.

    Parameters
    ----------
    layer_idx : int
        For the message.
    keys, values : torch.Tensor
        `(B, H, Q, D)` and `(B, H, Q, Dv)`.
    held : tuple, optional
        `(B, H, D, Dv)`, dtype and device of what is stored.
    """
    where = f"layer {layer_idx}"
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"{where}: keys and values must be (batch, heads, tokens, head_dim) with equal first three sizes, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(f"{where}: keys are {keys.dtype} on {keys.device}, values {values.dtype} on {values.device}")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise RuntimeError(
            f"{where}: K/V require gradients, which this cache does not keep; "
            "call the model under torch.no_grad() or train without past_key_values"
        )
    if held is None:
        return
    shape, dtype, device = held
    if (new := (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])) != shape:
        raise ValueError(
            f"{where}: got K/V with (batch, heads, key dim, value dim) = {new}, but the cache holds {shape}; "
            "a cache serves one model and one batch until reset()"
        )
    if (keys.dtype, keys.device) != (dtype, device):
        raise ValueError(f"{where}: got {keys.dtype} on {keys.device}, but the cache holds {dtype} on {device}")


# Up to 5.17 `crop(0)` keeps nothing, from 5.18 on it removes nothing.
_ZERO_REMOVES_NOTHING = Version(transformers.__version__) >= Version("5.18.0.dev0")


def cropped_length(seen: int, argument: int) -> int:
    """Return how many of `seen` positions `crop(argument)` keeps.

    A negative argument is a number of tokens to remove, which all releases of transformers agree on. A positive one is
    the length to keep, as up to 5.17; zero means what the installed release means by it.
    """
    if argument < 0 or (argument == 0 and _ZERO_REMOVES_NOTHING):
        return max(0, seen + argument)
    return min(seen, argument)


class PiKVLayer(CacheLayerMixin):
    """The paged K/V of one attention layer.

    Parameters
    ----------
    layer_idx : int
        The model layer.
    config : PiKVConfig
        Page size, window, shards.
    attachment : Attachment, optional
        The attached model. Without one, `update` returns dense K/V for any attention implementation.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, layer_idx: int, config: PiKVConfig, attachment: "Attachment | None" = None) -> None:
        self.layer_idx = layer_idx
        self.config = config
        self.attachment = attachment
        self.routed = attachment is not None and config.placement != "hash" and layer_idx in attachment.routers
        self._clear()

    def _clear(self) -> None:
        self.table: PageTable | None = None
        self.pending: Pending | None = None
        self.seen = 0
        self.is_initialized = False
        # Whether every stored token is known to be real. Then a causal mask hides none of them, and is not looked at.
        self.vetted = True
        self._slots: torch.Tensor | None = None
        # Whether the key tensor last returned carries a reference that no attention call has picked up yet, and
        # whether one of a prompt got lost on the way (JetMoE repeats the keys), where the new K/V alone are right:
        # from then on the layer returns dense K/V.
        self._reference_out = False
        self._reference_lost = False
        self._history_out = False

    def _shard_of(self) -> ShardOf:
        if self.routed and self.attachment is not None:
            num_experts = self.attachment.routers[self.layer_idx].num_experts
            return expert_placement(num_experts, self.config.num_shards, self.layer_idx)
        return hash_placement(self.config.page_size, self.config.num_shards)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the empty pool and page table for K/V of these shapes."""
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        size = self.config.page_size
        pool = PagePool(heads, dim, value_states.shape[-1], size, self.dtype, self.device)
        shards, window, sinks = self.config.num_shards, self.config.recent_window, self.config.sink_tokens
        self.table = PageTable(
            SequenceWriter(PageStore(pool, self.config), shards, window, sinks, self._shard_of()), batch
        )
        self.is_initialized = True

    # Updating

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            `(B, H, Q, D)` and `(B, H, Q, Dv)`.

        Returns
        -------
        tuple of torch.Tensor
            For an attached model the new K/V alone, the keys carrying a reference to this layer, from which PiKV's
            attention function reads the history. Otherwise all K/V, `(B, H, T, D)` and `(B, H, T, Dv)`.

        Raises
        ------
        ValueError, RuntimeError
            If the tensors do not fit what is stored; nothing has changed then.
        """
        self._check(key_states, value_states)
        in_place = self._reads_in_place()
        self.settle()
        if self.table is None:
            self.lazy_initialization(key_states, value_states)
        history = self.seen > 0
        if history and not in_place:
            past = self.dense()
        if key_states.shape[2] == 1 and history:
            self._append(key_states, value_states)
        else:
            self.pending = Pending(key_states, value_states)
        self.seen += key_states.shape[2]
        self.vetted &= in_place
        if self.routed and self.attachment is not None:
            self.attachment.expect(self)
        elif not in_place:
            self.settle()
        if not in_place:
            if not history:
                return key_states, value_states
            return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)
        # A view of its own: the attribute must not outlive this call on a tensor that the caller keeps.
        keys = key_states.view(key_states.shape)
        setattr(keys, LAYER_ATTRIBUTE, self)
        self._reference_out, self._history_out = True, history
        return keys, value_states

    def _reads_in_place(self) -> bool:
        """Return whether PiKV's attention function will see what `update` returns."""
        if self.attachment is None or not self.attachment.is_active(self.layer_idx):
            return False
        if self._reference_out and self._history_out:
            raise RuntimeError(
                f"layer {self.layer_idx}: no attention has read the history that the last update referred to. Either "
                "that call was interrupted, or something between update and attention copies the keys. Take the call's "
                "tokens back with cache.crop(length)"
            )
        self._reference_lost |= self._reference_out
        return not self._reference_lost

    def attend_begins(self, valid: torch.Tensor | None) -> None:
        """Take the attention function's word on padding.

        Parameters
        ----------
        valid : torch.Tensor, optional
            `(B, Q)` bool, which of the new tokens are real, or None if all are.
        """
        self._reference_out = False
        if self.pending is not None:
            self.pending.valid, self.pending.vetted = valid, True
        elif valid is not None:
            self.vetted = False

    def observe(self, query: torch.Tensor, scale: float) -> None:
        """Remember the newest queries `(B, Hq, Q, D)`, by which the errors of pages that are packed next are judged."""
        if self.table is None or not self.table.pages.seals:
            return
        batch, _, new, dim = query.shape
        heads = self.table.pool.keys.shape[0]
        if new == 1 and self.table.pages.queries is not None and self.seen % self.config.page_size:
            # Pages fill now and then: looking at every decoded token would only cost time.
            return
        recent = query[:, :, -OBSERVED_POSITIONS:].reshape(batch, heads, -1, dim).transpose(0, 1)
        self.table.pages.observe(recent.reshape(heads, -1, dim)[:, :MAX_OBSERVED].clone(), scale)

    def attend_ends(self) -> None:
        """Store the new tokens if no router is to be awaited."""
        if not self.routed:
            self.settle()

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        held = None
        if self.table is not None:
            pool = self.table.pool
            shape = (len(self.table.rows), pool.keys.shape[0], pool.keys.shape[3], pool.values.shape[3])
            held = shape, self.dtype, self.device
        check_fits(self.layer_idx, keys, values, held)

    def rollback(self, tokens: int) -> None:
        """Take back the last update, of `tokens` tokens, which no attention has seen."""
        self._reference_out = False
        self.truncate(self.seen - tokens)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one decoded token per row into the window; its expert follows from the router."""
        assert self.table is not None
        self._slots = self.table.pool.index(self.table.next_slots())
        self.table.pool.write_newest(
            self._slots, keys.squeeze(2).transpose(0, 1), values.squeeze(2).transpose(0, 1), self.seen
        )

    def record_experts(self, experts: torch.Tensor) -> None:
        """Take the primary experts of the newest tokens, `(B * Q,)` integers, and place what was waiting for them."""
        assert self.table is not None
        batch = len(self.table.rows)
        expected = batch if self.pending is None else batch * self.pending.keys.shape[2]
        if experts.numel() != expected:
            raise RuntimeError(
                f"layer {self.layer_idx}: the router chose experts for {experts.numel()} tokens, "
                f"the cache got {expected}"
            )
        if self.pending is not None:
            self._place(experts.view(batch, -1))
        elif self._slots is not None:
            self.table.pool.experts.view(-1).index_copy_(0, self._slots, experts.to(torch.int16))

    def settle(self) -> None:
        """Store what is pending, where no router is awaited, and move what has left the window to its shards."""
        if self.pending is not None:
            keys = self.pending.keys
            self._place(torch.full((keys.shape[0], keys.shape[2]), -1, device=keys.device))
        if self.table is not None:
            self.table.flush()

    def _place(self, experts: torch.Tensor) -> None:
        assert self.table is not None
        assert self.pending is not None
        new, start = self.pending, self.seen - self.pending.keys.shape[2]
        positions = torch.arange(start, self.seen, dtype=torch.int32, device=self.device)
        self.table.store(new.keys, new.values, positions, experts.to(torch.int16), new.valid)
        self.vetted &= new.vetted
        self.pending = None

    # Reading

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all stored K/V in time order, `(B, H, T, D)` and `(B, H, T, Dv)`; padding reads as zeros."""
        self.settle()
        assert self.table is not None
        return self.table.dense(self.seen)

    @property
    def keys(self) -> torch.Tensor | None:
        """The stored keys, dense; None before the first update. A copy: writing to it changes nothing."""
        return None if self.table is None else self.dense()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """The stored values, dense; None before the first update. A copy: writing to it changes nothing."""
        return None if self.table is None else self.dense()[1]

    def get_seq_length(self) -> int:
        """Return the number of positions seen, padding included."""
        return self.seen

    def get_mask_sizes(self, cache_position: torch.Tensor | int) -> tuple[int, int]:
        """Return `(kv_length, kv_offset)` of the mask for the coming call, in logical positions."""
        new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        return self.seen + new, 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum length."""
        return -1

    def get_max_length(self) -> int:
        """Return -1: the layer has no maximum length (transformers' name from 5.14 on)."""
        return -1

    def storages(self) -> list[torch.Tensor]:
        """Return the tensors that hold this layer's memory."""
        held = [] if self.table is None else self.table.pages.tensors()
        return held if self.pending is None else [*held, self.pending.keys, self.pending.values]

    # Changing rows and length

    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`. No token is copied."""
        if self.table is None:
            return
        self.table.select(indices)
        self._slots = None
        if self.pending is not None:
            index = torch.as_tensor(list(indices), device=self.device)
            valid = None if self.pending.valid is None else self.pending.valid[index]
            self.pending = dataclasses.replace(
                self.pending, keys=self.pending.keys[index], values=self.pending.values[index], valid=valid
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        if self.table is not None:
            self.select([row for row in range(len(self.table.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`."""
        if self.table is not None:
            self.select(torch.arange(len(self.table.rows))[indices.cpu()].tolist())

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length`; see :func:`cropped_length`."""
        self.truncate(cropped_length(self.seen, max_length))

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        if length >= self.seen or self.table is None:
            return
        if self.pending is not None and length <= self.seen - self.pending.keys.shape[2]:
            self.pending = None
        self.settle()
        self.table.crop(length)
        self.seen = length
        self._slots = None
        self._reference_lost |= self._reference_out and not self._history_out
        self._reference_out = False

    def reset(self) -> None:
        """Forget everything and return the memory."""
        self._clear()

    def fork(self) -> "PiKVLayer":
        """Return a copy that shares all pages until either side writes to them."""
        self.settle()
        twin = PiKVLayer(self.layer_idx, self.config, self.attachment)
        if self.table is not None:
            twin.table = self.table.fork()
            twin.dtype, twin.device = self.dtype, self.device
        twin.seen, twin.is_initialized, twin.vetted = self.seen, self.is_initialized, self.vetted
        twin._reference_out, twin._history_out = self._reference_out, self._history_out
        twin._reference_lost = self._reference_lost
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVLayer":
        return self.fork()

    def offload(self) -> None:
        """Refuse: transformers' own offloading moves whole dense layers, which this cache does not have."""
        raise NotImplementedError("PiKVCache cannot be moved by transformers' offloading; leave offloading=False")

    prefetch = offload
