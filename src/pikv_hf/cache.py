"""The cache object that transformers talks to."""

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .config import PiKVConfig
from .distributed.device_layout import Devices, PartLayout, find_spread
from .integration.attachment import Attachment, ensure_attached
from .integration.model_modules import unwrapped
from .layer import layer_list
from .layer.cache_lock import new_cache_lock
from .layer.copied_layers import copy_layers
from .layer.input_checks import admit
from .layer.layer import PiKVLayer
from .layer.layer_making import check_has_pages, checked_options, effective_options, make_layers
from .layer.layer_operation import layer_operation
from .layer.own_layer import has_positions, is_state_layer
from .layer.row_choice import beam_rows, rows_at
from .layer.sliding_layer import kv_format, update_sliding
from .reports.cache_stats import CacheStats
from .reports.memory_measure import layer_memory
from .reports.memory_report import MemoryReport
from .serialization.model_adapters import Adapter, adapters_now
from .serialization.save_load import load_cache, save_cache


class PiKVCache(Cache):
    """An expert-sharded, paged KV cache: the tokens of `DynamicCache`, unless a codec or press is asked for.

    Make one with :meth:`for_model`, which attaches the model so that attention reads the pages in place and tokens move
    to the shards of the experts that the model's own routers choose. Made from a config alone it works with any
    attention implementation, by returning dense K/V, and places tokens by position; it never sees the mask, so that it
    stores padding too.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's config; it tells the number of layers and which of them slide.
    pikv_config : PiKVConfig, optional
        Storage options.
    attachment : Attachment, optional
        The attached model; :meth:`for_model` passes it.
    spread : Devices or PartLayout, optional
        Where shards are, if not all where the layer's attention is; :meth:`for_model` passes it.

    Raises
    ------
    TypeError, ValueError
        For a model or single options, with what takes them; for unsupported architectures, or a placement by experts
        without an attached model.

    Examples
    --------
    >>> cache = PiKVCache.for_model(model, page_size=32, num_shards=8)
    >>> model.generate(**inputs, past_key_values=cache)  # cache=cache from transformers 5.24 on
    >>> print(cache.memory_report())
    """

    #: There is none. PEFT asks for it, and has prefix tuning use a `DynamicCache` of its own.
    max_cache_len = -1

    if not hasattr(Cache, "has_previous_state"):
        #: Set by models with room for recurrent layers; where all of their layers are attention it means nothing.
        has_previous_state = False

    def __init__(
        self,
        config: Any = None,
        pikv_config: PiKVConfig | None = None,
        attachment: Attachment | None = None,
        spread: Devices | PartLayout | None = None,
        **single_options: Any,
    ) -> None:
        options = checked_options(config, pikv_config, single_options, attached=attachment is not None)
        self.model_config = config
        # The adapters in use when the first tokens came; None where that is not known, as after `from_cache`.
        self.filled_under: list[Adapter] | None = None
        # What a store of contexts knows of the model as it was when it gave this cache away.
        self.read_under: object = None
        self.pikv_config = options
        self.attachment = attachment
        #: Of its layers and forks too.
        self.lock = new_cache_lock()
        self._make_layers = functools.partial(make_layers, config, options, attachment, spread, self.lock)
        layers, self.tiers = self._make_layers()
        self._first = next((index for index, layer in enumerate(layers) if has_positions(layer)), 0)
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls,
        model: Any,
        pikv_config: PiKVConfig | None = None,
        *,
        devices: str | Sequence[str | int | torch.device] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        process_group: str | None = None,
        timeout: float = 600.0,
        **options: Any,
    ) -> "PiKVCache":
        """Attach a model and make a cache for it.

        Parameters
        ----------
        model : PreTrainedModel
            A decoder-only model, or a wrapper of one; see :func:`~pikv_hf.attach`.
        pikv_config : PiKVConfig, optional
            All options at once.
        devices : "auto" or sequence of devices, optional
            Spread the shards over these devices: attention to a page runs where it is, and only queries, outputs and
            their log-sum-exps travel. `"auto"` takes all accelerators that `accelerate` sees. By default everything is
            where the layer's attention is. See :func:`~pikv_hf.distributed.device_layout.find_devices`.
        max_memory : mapping, optional
            As for `accelerate`: what each device may give; shards are divided in these proportions.
        process_group : "world", optional
            Spread the shards over the processes that `torchrun` or `accelerate launch` started. Each runs the model on
            the same inputs with the same seed, keeps its own shards, and gets the same tokens as one process would. All
            of them must make the cache, and use it alike.
        timeout : float
            Seconds after which processes stop waiting for one that has died.
        **options
            Or single options of :class:`PiKVConfig`. `placement` is `"expert"` unless given.

        Raises
        ------
        TypeError, ValueError
            For unknown or invalid options, unsupported models, devices that there are not, models without a known
            router unless `placement="hash"`, and a budget where no layer is kept in pages.
        RuntimeError
            If `process_group` is given, but not several processes were started.
        """
        if pikv_config is not None and options:
            raise TypeError(f"give either pikv_config or single options, got both (options: {', '.join(options)})")
        config = PiKVConfig.from_dict(options) if pikv_config is None else pikv_config
        made = cls._over(find_spread(devices, max_memory, process_group, timeout), model, config)
        check_has_pages(made.layers, config)
        return made

    @classmethod
    def from_cache(cls, model: Any, cache: Cache, pikv_config: PiKVConfig | None = None, **options: Any) -> "PiKVCache":
        """Attach a model and make a cache with the tokens of another one, a `DynamicCache` say, which stays as it is.

        No router has seen these tokens: they are placed by position. All of them are stored, since a cache does not
        tell which are padding; masks hide it as before.

        Parameters
        ----------
        model, pikv_config, **options
            As for :meth:`for_model`.
        cache : Cache
            Of the same model, its layers full or sliding.

        Raises
        ------
        TypeError, ValueError
            For caches with layers of other kinds, with tokens evicted, for another number of layers, or where sliding
            layers have let go of tokens that paged ones would need; and as :meth:`for_model`.
        """
        made = cls.for_model(model, pikv_config, **options)
        copy_layers(cache, made.layers)
        return made

    @classmethod
    def _over(cls, spread: Devices | PartLayout | None, model: Any, config: PiKVConfig) -> "PiKVCache":
        """Attach a model and make a cache for it in these places, None for that of each layer's attention."""
        attachment = ensure_attached(model, config.placement or "expert")
        attachment.count_cache()
        return cls(attachment.model.config, config, attachment, spread)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new K/V of a layer; see :meth:`PiKVLayer.update`. Who is not the model's attention gets all K/V."""
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx is {layer_idx}, but the cache was made for a model of {len(self)} layers")
        layer = self.layers[layer_idx]
        # For `save`: others may be active by then.
        if (layer_idx == self._first or self.filled_under is None) and not layer.get_seq_length():
            self.filled_under = adapters_now(None if self.attachment is None else self.attachment.model)
        if layer_idx == self._first:
            if self._is_from_outside(layer):
                admit(layer_idx, key_states, value_states, layer_list.format_of(layer), self.attachment)
                layer_list.check_read_from_outside(self.layers)
            layer_list.complete_assignments(self.layers)
        if not isinstance(layer, PiKVLayer) and isinstance(layer, DynamicSlidingWindowLayer):
            return update_sliding(layer, *admit(layer_idx, key_states, value_states, kv_format(layer), self.attachment))
        # kvpress puts a layer of its own in place of one for a while.
        result: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return result

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Store the new states of a convolution: transformers' own, beside paged layers."""
        comes_first = layer_idx <= self._first and not any(map(is_state_layer, self.layers[:layer_idx]))
        if comes_first and self._is_from_outside(self):
            layer_list.check_read_from_outside(self.layers)
        own: Any = super()
        result: torch.Tensor = own.update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return result

    def _is_from_outside(self, updated: Any) -> bool:
        """Return whether there is an attached model that does not make the call which updates the cache or a layer."""
        return self.attachment is not None and not self.attachment.gives_to(updated)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the number of positions that the model has seen, padding and evicted tokens included.

        For a layer given by its index, what the layer itself counts: where K/V were assigned from outside, as kvpress
        does, these tokens alone.
        """
        if layer_idx is not None:
            if layer_idx < len(self.layers) and isinstance(layer := self.layers[layer_idx], PiKVLayer):
                layer.edits.request_snapshot()
            return super().get_seq_length(layer_idx)
        first = self.layers[self._first] if self.layers else None
        return first.state.positions_seen if isinstance(first, PiKVLayer) else super().get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return how many positions a layer has before its next tokens, for the masks of later transformers."""
        layer = self.layers[layer_idx]
        if isinstance(layer, PiKVLayer):
            return layer.state.positions_seen
        return int(layer.get_seq_length()) if has_positions(layer) else self.get_seq_length()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Yield dense keys and values of each layer, and how far it looks back, as transformers' caches do.

        Raises
        ------
        ValueError
            If tokens were evicted, or padding left out: dense K/V have zeros in their place.
        """
        return layer_list.dense_layers(self.layers)

    def reset(self) -> None:
        """Forget everything, what was counted too, and return the memory: the cache is like a new one."""
        made: Any = self._make_layers()
        (self.layers, self.tiers), self.filled_under, self.read_under = made, None, None

    @layer_operation
    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length` if it is negative.

        Zero means what the installed transformers means by it: keep nothing up to 5.17, remove nothing from 5.18 on.

        Raises
        ------
        ValueError
            If a sliding layer has already dropped tokens that the shorter cache would need; nothing is changed then.
        """
        layer_list.crop_layers(self.layers, self.get_seq_length(), max_length)

    @layer_operation
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search: page tables change, no token is copied."""
        layer_list.select_rows(self.layers, beam_rows(beam_idx))

    @layer_operation
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        rows = torch.arange(layer_list.row_count(self.layers) or 0)
        layer_list.select_rows(self.layers, rows.repeat_interleave(repeats))

    @layer_operation
    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows at `indices`: integers or bools, in a tensor or list, or a slice."""
        if (rows := layer_list.row_count(self.layers)) is not None:
            layer_list.select_rows(self.layers, rows_at(indices, rows))

    @layer_operation
    def fork(self) -> "PiKVCache":
        """Return a copy that shares all pages until either side writes to them: one context, many questions."""
        twin = copy.copy(self)
        twin.layers = layer_list.fork_layers(self.layers)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVCache":
        return self.fork()

    def __copy__(self) -> "PiKVCache":
        twin = PiKVCache.__new__(PiKVCache)
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Layers refer to a model, files and threads: what is left of these in another process is for save() to say.
        raise TypeError("a PiKVCache cannot be pickled: write it with save() and read it with PiKVCache.load()")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, from which :meth:`load` goes on with the same tokens.

        Only pages in use are written, shared ones once: in the safetensors format, with checksums and a fingerprint of
        the model and of its active adapters, or of the config alone. The file appears when all of it is on disk. Of
        several processes, all of which must call this, each writes its own, `<path>.<rank>-of-<processes>`.

        Parameters
        ----------
        path : path-like
            The file; its folder must exist.

        Raises
        ------
        ValueError
            If new tokens wait, other adapters are active than when it was filled, or it has outlived its model.
        OSError
            If the file could not be written; an older one is as it was.
        ProcessError
            If another process could not; older files are as they were.
        """
        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        devices: str | Sequence[str | int | torch.device] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        process_group: str | None = None,
        timeout: float = 600.0,
        **options: Any,
    ) -> "PiKVCache":
        """Attach a model and return the cache that :meth:`save` wrote.

        Everything is checked before anything is built. Each layer comes to its attention's device, or to as many
        devices or processes as it was saved on.

        Parameters
        ----------
        path : path-like
            The file.
        model : PreTrainedModel or PreTrainedConfig
            The model that the cache was saved with, or one with the same config, dtype, weights and active adapters;
            also in a wrapper. For a cache that was made from a config alone, a model of the same config, or the config:
            then the pages come to where new tensors are made (`torch.get_default_device()`).
        devices, max_memory, process_group, timeout
            Where the parts of the cache go, as in :meth:`for_model`. Devices may be others than those that it was saved
            on; what they may give says how later tokens are divided.
        **options
            Options of :class:`PiKVConfig` to be others from now on, as far as they do not lay out pages: `routing`,
            `budget`, `scheduler`, `tiers`, and those that belong to them.

        Raises
        ------
        ValueError
            If the file is no saved cache, of another layout version, damaged or cut off, or was saved with another
            model or in another number of parts, or if files of several processes are of different saves; what differs
            is named.
        TypeError
            For unknown options.
        OSError
            If it cannot be read.
        ProcessError
            If another process could not load its part.
        """
        spread = find_spread(devices, max_memory, process_group, timeout)
        model = model if isinstance(model, PreTrainedConfig) else unwrapped(model)

        def make(config: PiKVConfig, attached: bool) -> "PiKVCache":
            return cls._over(spread, model, config) if attached else cls(getattr(model, "config", model), config)

        return load_cache(make, path, model, spread, options)

    @property
    def nbytes(self) -> int:
        """Live bytes of every distinct storage, metadata included; forks share theirs, and each reports all of them."""
        return self.memory_report().total

    @property
    def total_nbytes(self) -> int:
        """:attr:`nbytes` of all processes that keep this cache together; all of them must ask."""
        exchange = next((layer.exchange for layer in layer_list.paged_layers(self.layers)), None)
        return self.nbytes if exchange is None else exchange.sum(self.nbytes)

    @layer_operation
    def memory_report(self) -> MemoryReport:
        """Return where the bytes are: by layer, shard and device, K, V, metadata and window."""
        for layer in layer_list.paged_layers(self.layers):
            layer.edits.settle_unless_awaited()
            layer.store.release_abandoned()
        layers = tuple(part for index, layer in enumerate(self.layers) for part in layer_memory(index, layer))
        return MemoryReport(total=sum(layer.total for layer in layers), layers=layers)

    @layer_operation
    def stats(self) -> CacheStats:
        """Return what was read, evicted and moved between tiers so far; `print` shows it as tables."""
        for layer in layer_list.paged_layers(self.layers):
            layer.store.release_abandoned()
        return CacheStats.of(layer_list.paged_layers(self.layers), self.tiers)

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers, {len(layer_list.paged_layers(self.layers))} of them paged"
        effective = effective_options(self.pikv_config, self.attachment is not None, self.layers)
        options = "".join(f", {name}={value!r}" for name, value in effective.items())
        return f"PiKVCache({layers}, {self.get_seq_length():,} tokens seen{options})"
