"""The store of contexts: remembers K/V of what was read, and gives the longest known prefix of a prompt back."""

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import PiKVCache
from ..common.budget import bytes_text, parse_bytes
from ..config import PiKVConfig
from ..distributed.device_layout import attention_device
from ..integration.model_modules import find_attention_modules, unwrapped
from ..layer.layer import PiKVLayer
from ..layer.layer_list import paged_layers, row_count
from ..layer.own_layer import has_positions, is_state_layer
from ..serialization.model_adapters import adapters_now, difference
from ..serialization.tensor_file import CacheFileError
from .active_press import has_press
from .context_folder import ContextFolder
from .context_key import ContextKey, ModelWatch, check_alike
from .context_memory import ContextMemory
from .generation import generate_with
from .radix_tree import Tokens
from .store_stats import StoreStats


class ContextStore:
    """Reads no token twice: prompts that begin alike share K/V, whatever order and thread they come in.

    Entries are forks of one another: a page that several contexts begin with is there once. They are found by token
    ids, and by what else K/V depend on: the model's weights and its active adapters; changed ones find nothing of
    before. Layers with recurrent states or sliding windows cannot be cropped: there a context is reused as a whole, or
    as far as one of the checkpoints that :meth:`generate` puts while it reads.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model, or a wrapper of one; it is attached, as by :meth:`PiKVCache.for_model`.
    budget : str or int, optional
        The most bytes that entries may hold (`"8GiB"`), which holds after every call. Pages that only caches in use
        hold do not count. No limit by default.
    path : path-like, optional
        A folder, made if it is not there, that keeps contexts for later processes; several may use it at once. K/V are
        written as they are decoded, every token once.
    disk : str or int, optional
        The most bytes of the files of this model, options and salt there. No limit by default.
    salt : str
        Contexts that were written under another salt are not found.
    least : int, optional
        The shortest prefix that is reused, in tokens; by default one page.
    checkpoint_every : int
        Tokens between checkpoints, of models whose layers cannot all be cropped. Each takes the memory of its states
        and windows.
    **options
        Of the caches, as for :meth:`PiKVCache.for_model`: `page_size`, `key_codec`, `devices`, ...

    Raises
    ------
    TypeError, ValueError
        For unknown options and unsupported models, and a budget that is no number of bytes.

    Examples
    --------
    >>> store = ContextStore(model, budget="8GiB")
    >>> out = store.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=200)
    >>> cache, known = store.get(input_ids)  # or by hand
    >>> store.put(input_ids, cache)  # once it has read them
    """

    def __init__(
        self,
        model: Any,
        budget: str | int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        disk: str | int | None = None,
        salt: str = "",
        least: int | None = None,
        checkpoint_every: int = 512,
        **options: Any,
    ) -> None:
        check_alike(unwrapped(model))
        self.model = model
        self.budget = _bytes("budget", budget)
        self._path, self._disk, self._salt = None if path is None else Path(path), _bytes("disk", disk), salt
        if disk is not None and path is None:
            raise ValueError(f"disk={disk!r} limits what is in a folder, and there is none: give path=")
        self._options = options
        # What is wrong with the options is said now.
        self._empty = PiKVCache.for_model(model, **options)
        config: PiKVConfig = self._empty.pikv_config
        self.least = config.page_size if least is None else least
        for name, tokens in (("least", self.least), ("checkpoint_every", checkpoint_every)):
            if tokens < 1:
                raise ValueError(f"{name} must be at least 1 token, got {tokens!r}")
        kept_whole = any(map(_changes_for_good, self._empty.layers))
        #: Tokens between checkpoints, None where all layers can be cropped.
        self.checkpoints = checkpoint_every if kept_whole else None
        self._modules = find_attention_modules(unwrapped(model))
        self._watch = ModelWatch(unwrapped(model))
        if config.budget is not None:
            raise ValueError(f"a store's caches keep all tokens, got a budget of {config.budget} for each of them")
        paged = paged_layers(self._empty.layers)
        if any(layer.exchange is not None for layer in paged):
            raise ValueError("a store is of one process, got process_group=")
        #: Whether rows of different contexts can be one batch.
        self.joins_rows = self.checkpoints is None and all(len(layer.parts) == 1 for layer in paged)
        if path is not None and any(len(layer.parts) > 1 for layer in paged):
            raise ValueError("contexts whose shards are on several devices are kept in memory alone, got path=")
        self._folders: dict[ContextKey, ContextFolder] = {}
        self._memory = ContextMemory(self.budget, self.least)
        self._stats = StoreStats()
        #: Tokens whose reading was timed.
        self._timed = 0
        self._lock = threading.RLock()

    # Looking up

    def get(self, input_ids: torch.Tensor, *, most: int | None = None) -> tuple[PiKVCache, int]:
        """Return a cache that holds the longest known prefix of a prompt, and how many tokens that is.

        Parameters
        ----------
        input_ids : torch.Tensor
            `(n,)` or `(1, n)` integers, without padding.
        most : int, optional
            The longest prefix that is of use: `n - 1` where logits are wanted. All by default.

        Returns
        -------
        tuple
            A :class:`PiKVCache` of the caller's own, and its length; an empty one and 0 if nothing is known.
        """
        cache, known, common = self.look_up(input_ids, most)
        self.count_prompt(known, input_ids.numel(), common)
        return cache, known

    def look_up(self, input_ids: torch.Tensor, most: int | None = None) -> tuple[PiKVCache, int, int]:
        """Return what :meth:`get` does, and how many tokens are known at all; nothing is counted."""
        tokens = tokens_of(input_ids)
        with self._lock:
            key = self._watch.key()
            cache, known, common = self._longest(key, tokens[:most])
            cache.read_under = key
        return cache, known, common

    def count_prompt(self, known: int, tokens: int, common: int) -> None:
        """Count a prompt of so many tokens, of which `known` are reused and `common` might have been."""
        with self._lock:
            stats = self._stats
            stats.hits += bool(known)
            stats.misses += not known
            stats.tokens_reused += known
            stats.tokens_read += tokens - known
            stats.tokens_unreachable += common - known

    def _longest(self, key: ContextKey, tokens: Tokens) -> tuple[PiKVCache, int, int]:
        """Return what begins with most of these tokens, its length, and how many of them are known at all."""
        if (loaded := self._from_files(key, tokens)) is not None:
            return *loaded, loaded[1]
        cache, known, common = self._memory.longest(key, tokens)
        return (self.new() if cache is None else cache), known, common

    def new(self) -> PiKVCache:
        """Return an empty cache with the store's options."""
        return PiKVCache.for_model(self.model, **self._options)

    def _folder(self, key: ContextKey) -> ContextFolder | None:
        """Return what keeps contexts of this key for later processes."""
        if self._path is None:
            return None
        if key not in self._folders:
            name = self._watch.folder(self._empty.pikv_config.to_json(), self._salt)
            self._folders[key] = ContextFolder(self._path / name, self._disk)
        return self._folders[key]

    def _from_files(self, key: ContextKey, tokens: Tokens) -> tuple[PiKVCache, int] | None:
        """Return a cache with what files know of these tokens and its length, None if memory knows as much."""
        if (folder := self._folder(key)) is None:
            return None
        cropped = self.checkpoints is None
        while (stored := folder.find(tokens) if cropped else folder.whole(tokens)) >= self.least:
            if self._memory.known(key, tokens, whole=not cropped) >= stored:
                return None
            # States and windows come from the file; of tokens that memory knows the rest is read.
            cache, known, _ = self._memory.longest(key, tokens) if cropped else (None, 0, 0)
            cache = self.new() if cache is None else cache
            try:
                folder.extend(cache, tokens, stored, self._device_of)
            except (CacheFileError, OSError):
                # It is forgotten, and there may be another one.
                continue
            cache.filled_under = adapters_now(unwrapped(self.model))
            self._stats.tokens_loaded += stored - known
            self._memory.put(key, tokens[:stored], cache.fork())
            return cache, stored
        return None

    def _device_of(self, layer: int) -> torch.device:
        found = self._modules.get(layer)
        return attention_device(None if found is None else found[1], unwrapped(self.model))

    # Remembering

    def put(self, input_ids: torch.Tensor, cache: PiKVCache) -> bool:
        """Remember what a cache holds; it stays the caller's, and later changes to it are not seen.

        Parameters
        ----------
        input_ids : torch.Tensor
            `(n,)` or `(1, n)`, the tokens that the cache has read. What `generate` returns has one more, which was
            not: tokens behind those of the cache are left out.
        cache : PiKVCache
            Of one row without padding, made by :meth:`get` or with the same options for the same model.

        Returns
        -------
        bool
            Whether it is remembered: not where it alone exceeds the budget.

        Raises
        ------
        ValueError
            If the cache has read more tokens than are given, has several rows or padding, is of another model, of other
            options or devices, lacks tokens that a press has evicted, or was filled under other adapters; or if weights
            have changed since :meth:`get` made it, or what it is a fork of.
        """
        tokens = tokens_of(input_ids)
        self._check(tokens, cache)
        tokens = tokens[: cache.get_seq_length()]
        with self._lock:
            key = self._watch.key()
            if cache.read_under not in (None, key):
                raise ValueError(
                    "the cache was made before the model's weights or adapters changed: it is not what they compute"
                )
            filled = cache.filled_under
            if filled is not None and (differences := difference(filled, adapters_now(unwrapped(self.model)))):
                raise ValueError(f"the cache was filled by another model: {differences}")
            if len(tokens):
                self._memory.put(key, tokens, cache.fork())
            folder = self._folder(key)
            kept = self._memory.known(key, tokens) == len(tokens)
        if folder is not None and len(tokens):
            # Others go on meanwhile.
            folder.write(tokens, cache)
        return kept

    def _check(self, tokens: Tokens, cache: PiKVCache) -> None:
        if not isinstance(cache, PiKVCache):
            raise TypeError(f"a store keeps PiKVCache, got {type(cache).__name__}; see PiKVCache.from_cache")
        if cache.attachment is None or cache.attachment.model is not unwrapped(self.model):
            raise ValueError("the cache was made for another model than the store's; use store.get()")
        if cache.pikv_config != self._empty.pikv_config:
            raise ValueError(
                f"the cache has other options than the store: {cache.pikv_config} and {self._empty.pikv_config}"
            )
        if (seen := cache.get_seq_length()) > len(tokens):
            raise ValueError(f"the cache has read {seen} tokens, and {len(tokens)} are given")
        if (rows := row_count(cache.layers)) not in (None, 1):
            raise ValueError(f"the cache has {rows} rows, and a context is one; see batch_select_indices")
        parts, own = ([len(layer.parts) for layer in paged_layers(each.layers)] for each in (cache, self._empty))
        if parts != own:
            raise ValueError(f"the cache's layers are in {parts} parts, those of the store's caches in {own}")
        for layer in paged_layers(cache.layers):
            if layer.store.is_padded:
                raise ValueError("the cache has padding, and contexts are found by their tokens alone")
            if layer.state.evicted or layer.state.assigned or layer.state.dropped:
                raise ValueError(
                    f"layer {layer.layer_idx} of the cache lacks tokens that were evicted, or has others from outside: "
                    "it is not what the model reads"
                )

    @property
    def nbytes(self) -> int:
        """Bytes that entries hold, shared pages once, with the free pages of their pools."""
        with self._lock:
            return self._memory.nbytes

    def forget(self, input_ids: torch.Tensor | None = None) -> None:
        """Forget everything, or all contexts that begin with these tokens `(n,)` or `(1, n)`, in memory and in files.

        That is, of all weights and adapters that this store was used with. The last of the tokens does not count, since
        a prompt is remembered up to there. In files, contexts that share tokens with one that goes may go too.
        """
        tokens = np.zeros(0, dtype=np.int64) if input_ids is None else tokens_of(input_ids)[:-1]
        with self._lock:
            if self._path is not None:
                self._folder(self._watch.key())
            self._memory.forget(tokens)
            for folder in self._folders.values():
                folder.forget(tokens)
            if input_ids is None:
                # The model's weights may have changed unseen, after which the folder's name.
                self._folders.clear()

    # Using it

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Generate as `model.generate` does, without reading what is known, and remember prompt and answer.

        Parameters
        ----------
        input_ids : torch.Tensor
            `(B, n)`, padded on the left where `attention_mask` says so. Other inputs than token ids, and assisted
            decoding, go past the store; so do several rows where layers cannot be cropped.
        **kwargs
            As for `model.generate`, but for a cache.

        Returns
        -------
        torch.Tensor or ModelOutput
            What `model.generate` returns, the same tokens.

        Raises
        ------
        TypeError
            If a cache is given.
        """
        return generate_with(self, input_ids, kwargs)

    def count_read(self, known: int, tokens: int, seconds: float) -> None:
        """Note that a call of `generate` had `known` tokens, and read `tokens` in so many seconds."""
        with self._lock:
            self._stats.seconds_read += seconds
            self._timed += tokens
            if self._timed:
                self._stats.seconds_saved += known * self._stats.seconds_read / self._timed

    def count_not_reusable(self, prompts: int) -> None:
        """Note prompts that were generated from without the store."""
        with self._lock:
            self._stats.not_reusable += prompts

    def has_press(self) -> bool:
        """Return whether a press is at work on the model: then nothing is reused, and nothing remembered."""
        return has_press(module for _, module in self._modules.values())

    def stats(self) -> StoreStats:
        """Return what was reused and read so far, and what is held now; `print` shows it as a table."""
        with self._lock:
            entries, tokens = self._memory.size()
            now = {"entries": entries, "tokens_stored": tokens, "nbytes": self.nbytes}
            now["evictions"] = self._memory.evictions
            if (folder := self._folder(self._watch.key())) is not None:
                files, nbytes = folder.size()
                now |= {"files": files, "file_bytes": nbytes, "errors": folder.errors}
            return dataclasses.replace(self._stats, **now)

    def __len__(self) -> int:
        return self.stats().entries

    def __repr__(self) -> str:
        limit = "" if self.budget is None else f" of {bytes_text(self.budget)}"
        return f"ContextStore({len(self)} entries, {bytes_text(self.nbytes)}{limit})"


def _bytes(name: str, given: str | int | None) -> int | None:
    found = parse_bytes(given, name) if isinstance(given, str) else given
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
        raise ValueError(f"{name} must be a number of bytes, got {given!r}")
    return found


def tokens_of(input_ids: torch.Tensor) -> Tokens:
    """Return the token ids of one row, `(n,)` int64 on the host, of a tensor `(n,)` or `(1, n)`."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point() or input_ids.is_complex():
        raise TypeError(f"token ids are a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and input_ids.shape[0] != 1):
        raise ValueError(f"a context is one row of token ids, (n,) or (1, n), got {tuple(input_ids.shape)}")
    return np.asarray(input_ids.detach().reshape(-1).cpu().numpy(), dtype=np.int64)


def _changes_for_good(layer: Any) -> bool:
    return not isinstance(layer, PiKVLayer) and (has_positions(layer) or is_state_layer(layer))
