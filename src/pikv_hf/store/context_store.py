"""The store of contexts: remembers K/V of what was read, and gives the longest known prefix of a prompt back."""

import dataclasses
import threading
import weakref
from typing import Any

import numpy as np
import torch

from ..cache import PiKVCache
from ..common.budget import bytes_text, parse_bytes
from ..config import PiKVConfig
from ..integration.model_modules import unwrapped
from ..layer.layer import PiKVLayer
from ..layer.layer_list import row_count
from ..layer.own_layer import has_positions, is_state_layer
from .context_entry import ContextEntry, HeldPools, bytes_beyond, is_croppable
from .context_key import ContextKey, ModelWatch
from .eviction_value import ContextNode, ContextTree, entry_above, first_to_go, priority
from .generation import generate_with
from .radix_tree import RadixTree, Tokens
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
        least: int | None = None,
        checkpoint_every: int = 512,
        **options: Any,
    ) -> None:
        self.model = model
        self.budget = parse_bytes(budget, "budget") if isinstance(budget, str) else budget
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget must be a number of bytes, got {budget!r}")
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
        self._watch = ModelWatch(unwrapped(model))
        self._trees: dict[ContextKey, ContextTree] = {}
        self._pools = HeldPools()
        self._made_under: weakref.WeakKeyDictionary[PiKVCache, ContextKey] = weakref.WeakKeyDictionary()
        self._stats, self._held, self._age = StoreStats(), 0, 0.0
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
        tokens = tokens_of(input_ids)
        with self._lock:
            key = self._watch.key()
            cache, known, common = self._longest(key, tokens[:most])
            self._made_under[cache] = key
            stats = self._stats
            stats.hits += bool(known)
            stats.misses += not known
            stats.tokens_reused += known
            stats.tokens_read += len(tokens) - known
            stats.tokens_unreachable += common - known
        return cache, known

    def _longest(self, key: ContextKey, tokens: Tokens) -> tuple[PiKVCache, int, int]:
        """Return a fork of what begins with most of these tokens, its length, and how many of them are known at all.

        It is cut back to what they have in common, or is shorter where it cannot be cropped.
        """
        node, known = self._trees.get(key, RadixTree()).find(tokens)
        known = known if known >= self.least else 0
        if known:
            # Whatever lies below begins with these tokens.
            holder = next(each for each in node.below() if each.value is not None)
            if (fork := _first_tokens(holder, known)) is not None:
                return self._used(holder, fork), known, known
            for each in node.path():
                if each.value is not None and self.least <= each.length <= known:
                    return self._used(each, each.value.cache.fork()), each.length, known
        return PiKVCache.for_model(self.model, **self._options), 0, known

    def _used(self, node: ContextNode, fork: PiKVCache) -> PiKVCache:
        for each in node.path():
            if each.value is not None:
                each.value.uses += 1
                each.value.priority = priority(each, self._age)
        return fork

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
            If the cache has read more tokens than are given, has several rows or padding, is of another model or other
            options, or if adapters or weights have changed since :meth:`get` made it.
        """
        tokens = tokens_of(input_ids)
        self._check(tokens, cache)
        tokens = tokens[: cache.get_seq_length()]
        with self._lock:
            key = self._watch.key()
            if self._made_under.get(cache, key) != key:
                raise ValueError(
                    "the cache was made before the model's weights or adapters changed: it is not what they compute"
                )
            if len(tokens):
                self._insert(key, tokens, cache.fork())
                self._keep_budget()
            tree = self._trees.get(key)
            return tree is not None and tree.find(tokens)[1] == len(tokens)

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
        if any(getattr(getattr(layer, "store", None), "is_padded", False) for layer in cache.layers):
            raise ValueError("the cache has padding, and contexts are found by their tokens alone")

    def _insert(self, key: ContextKey, tokens: Tokens, cache: PiKVCache) -> None:
        """Put an entry into the tree, and one where it parts from another, so that what they share is known."""
        tree = self._trees.setdefault(key, RadixTree())
        node = tree.insert(tokens)
        parting = node.parent if node.value is None else None
        if node.value is None:
            node.value = self._entry(cache)
        if parting is not None and parting.parent is not None and parting.value is None:
            shared = _first_tokens(node, parting.length)
            parting.value = None if shared is None else self._entry(shared)
        for each in list(node.path())[1:]:
            if each.value is not None and len(each.children) == 1 and is_croppable(cache):
                # The one below it holds all of its tokens.
                self._drop(tree, each)
        for each in [*node.path(), *(child for above in node.path() for child in above.children.values())]:
            self._weigh(each)

    def _entry(self, cache: PiKVCache) -> ContextEntry:
        self._pools.add(cache)
        return ContextEntry(cache)

    def _weigh(self, node: ContextNode) -> None:
        """Measure what an entry holds beyond the one above it."""
        if (entry := node.value) is None:
            return
        above = entry_above(node)
        before = entry.nbytes
        entry.nbytes = bytes_beyond(entry.cache, None if above is None or above.value is None else above.value.cache)
        self._held += entry.nbytes - before
        entry.priority = priority(node, self._age)

    def _drop(self, tree: ContextTree, node: ContextNode) -> None:
        entry = node.value
        assert entry is not None
        self._held -= entry.nbytes
        below = [each for each in node.below() if each.value is not None and each is not node]
        tree.remove(node)
        self._pools.remove(entry.cache)
        for each in below:
            self._weigh(each)

    def _keep_budget(self) -> None:
        while self.budget is not None and self.nbytes > self.budget:
            found = first_to_go(self._trees.values())
            if found is None:
                return
            tree, node = found
            assert node.value is not None
            self._age = node.value.priority
            self._drop(tree, node)
            self._stats.evictions += 1
        self._trees = {key: tree for key, tree in self._trees.items() if tree.root.children}

    @property
    def nbytes(self) -> int:
        """Bytes that entries hold, shared pages once, with the free pages of their pools."""
        with self._lock:
            return self._held + self._pools.free_bytes()

    def forget(self, input_ids: torch.Tensor | None = None) -> None:
        """Forget everything, or all contexts that begin with these tokens `(n,)` or `(1, n)`, of every adapter."""
        with self._lock:
            for tree in list(self._trees.values()):
                tokens = np.zeros(0, dtype=np.int64) if input_ids is None else tokens_of(input_ids)
                node, known = tree.find(tokens)
                gone = [each for each in node.below() if each.value is not None] if known == len(tokens) else []
                for each in reversed(gone):
                    self._drop(tree, each)
            self._trees = {key: tree for key, tree in self._trees.items() if tree.root.children}

    # Using it

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Generate as `model.generate` does, without reading what is known, and remember prompt and answer.

        Parameters
        ----------
        input_ids : torch.Tensor
            `(B, n)`. Rows that differ, padding, other inputs than token ids, and assisted decoding go past the store.
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

    def stats(self) -> StoreStats:
        """Return what was reused and read so far, and what is held now; `print` shows it as a table."""
        with self._lock:
            nodes = [node for tree in self._trees.values() for node in tree.root.below()]
            entries = sum(node.value is not None for node in nodes)
            tokens = sum(len(node.edge) for node in nodes)
            return dataclasses.replace(self._stats, entries=entries, tokens_stored=tokens, nbytes=self.nbytes)

    def __len__(self) -> int:
        return self.stats().entries

    def __repr__(self) -> str:
        limit = "" if self.budget is None else f" of {bytes_text(self.budget)}"
        return f"ContextStore({len(self)} entries, {bytes_text(self.nbytes)}{limit})"


def tokens_of(input_ids: torch.Tensor) -> Tokens:
    """Return the token ids of one row, `(n,)` int64 on the host, of a tensor `(n,)` or `(1, n)`."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point() or input_ids.is_complex():
        raise TypeError(f"token ids are a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and input_ids.shape[0] != 1):
        raise ValueError(f"a context is one row of token ids, (n,) or (1, n), got {tuple(input_ids.shape)}")
    return np.asarray(input_ids.detach().reshape(-1).cpu().numpy(), dtype=np.int64)


def _changes_for_good(layer: Any) -> bool:
    return not isinstance(layer, PiKVLayer) and (has_positions(layer) or is_state_layer(layer))


def _first_tokens(node: ContextNode, length: int) -> PiKVCache | None:
    """Return a fork of an entry that holds its first tokens only, None where it cannot be cropped to them."""
    entry = node.value
    assert entry is not None
    fork = entry.cache.fork()
    if length == node.length:
        return fork
    if is_croppable(fork):
        fork.crop(length - node.length)
        return fork
    return None
