"""The contexts in memory: forks of one another in radix trees, within a budget of bytes."""

from collections.abc import Iterator

from ..cache import PiKVCache
from .context_entry import ContextEntry, HeldPools, bytes_beyond, is_croppable
from .context_key import ContextKey
from .eviction_value import ContextNode, ContextTree, entry_above, first_to_go, priority
from .radix_tree import RadixTree, Tokens


class ContextMemory:
    """A tree of entries for each key; the caller lets one thread in at a time.

    Parameters
    ----------
    budget : int or None
        The most bytes, after every call.
    least : int
        The shortest prefix that is of use.

    Attributes
    ----------
    evictions : int
        Entries that went for the budget.
    """

    def __init__(self, budget: int | None, least: int) -> None:
        self.budget, self.least, self.evictions = budget, least, 0
        self._trees: dict[ContextKey, ContextTree] = {}
        self._pools = HeldPools()
        self._held, self._age = 0, 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that entries hold, shared pages once, with the free pages of their pools."""
        # Caches that were in use may have left free pages since the last call.
        return self._held + self._pools.free_bytes(None if self.budget is None else self.budget - self._held)

    def size(self) -> tuple[int, int]:
        """Return how many entries there are, and of how many tokens, shared ones once."""
        nodes = [node for tree in self._trees.values() for node in tree.root.below()]
        return sum(node.value is not None for node in nodes), sum(len(node.edge) for node in nodes)

    def known(self, key: ContextKey, tokens: Tokens, whole: bool = False) -> int:
        """Return how many of the first tokens are known, or are the `whole` of an entry."""
        node, known = self._find(key, tokens)
        return max((each.length for each in _whole(node, known)), default=0) if whole else known

    def longest(self, key: ContextKey, tokens: Tokens) -> tuple[PiKVCache | None, int, int]:
        """Return a fork of what begins with most of these tokens, its length, and how many of them are known at all.

        It is cut back to what they have in common, or is shorter where it cannot be cropped, or None.
        """
        node, known = self._find(key, tokens)
        if known < self.least:
            return None, 0, 0
        # Whatever lies below begins with these tokens.
        holder = next(each for each in node.below() if each.value is not None)
        if (fork := _first_tokens(holder, known)) is not None:
            return self._used(holder, fork), known, known
        for each in _whole(node, known):
            if each.value is not None and each.length >= self.least:
                return self._used(each, each.value.cache.fork()), each.length, known
        return None, 0, known

    def _find(self, key: ContextKey, tokens: Tokens) -> tuple[ContextNode, int]:
        return self._trees.get(key, RadixTree()).find(tokens)

    def _used(self, node: ContextNode, fork: PiKVCache) -> PiKVCache:
        for each in node.path():
            if each.value is not None:
                each.value.uses += 1
                each.value.age = self._age
        return fork

    def put(self, key: ContextKey, tokens: Tokens, cache: PiKVCache) -> None:
        """Take over a cache of these tokens as an entry, and one of what it shares with others where they part."""
        tree = self._trees.setdefault(key, RadixTree())
        node = tree.insert(tokens)
        if node.value is not None:
            node.value.age = self._age
            return
        node.value = self._entry(cache)
        parting = node.parent
        assert parting is not None
        if parting is not tree.root and parting.value is None:
            try:
                shared = _first_tokens(node, parting.length)
            except BaseException:
                # Out of memory: nothing is counted yet.
                self._pools.remove(cache)
                tree.remove(node)
                raise
            parting.value = None if shared is None else self._entry(shared)
            self._weigh(parting)
            for child in parting.children.values():
                self._weigh_below(child)
        self._weigh_below(node)
        # What lies below begins with it now.
        for child in node.children.values():
            self._weigh_below(child)
        for each in list(node.path())[1:]:
            if each.value is not None and len(each.children) == 1 and is_croppable(cache):
                # The one below it holds all of its tokens.
                self._drop(tree, each)
        self._keep_budget()

    def _entry(self, cache: PiKVCache) -> ContextEntry:
        self._pools.add(cache)
        return ContextEntry(cache, age=self._age)

    def _weigh(self, node: ContextNode) -> None:
        """Measure what an entry holds beyond the one above it."""
        if (entry := node.value) is not None:
            above, before = entry_above(node), entry.nbytes
            held_above = None if above is None or above.value is None else above.value.cache
            entry.nbytes = bytes_beyond(entry.cache, held_above)
            self._held += entry.nbytes - before

    def _weigh_below(self, node: ContextNode) -> None:
        """Measure an entry, or the next ones below a node without one."""
        if node.value is not None:
            self._weigh(node)
            return
        for child in node.children.values():
            self._weigh_below(child)

    def _drop(self, tree: ContextTree, node: ContextNode) -> None:
        entry, children = node.value, list(node.children.values())
        assert entry is not None
        self._held -= entry.nbytes
        tree.remove(node)
        self._pools.remove(entry.cache)
        for child in children:
            self._weigh_below(child)

    def _keep_budget(self) -> None:
        while self.budget is not None and self.nbytes > self.budget:
            found = first_to_go(self._trees.values())
            if found is None:
                return
            tree, node = found
            self._age = priority(node)
            self._drop(tree, node)
            self.evictions += 1
        self._forget_empty()

    def _forget_empty(self) -> None:
        self._trees = {key: tree for key, tree in self._trees.items() if tree.root.children}

    def forget(self, tokens: Tokens) -> None:
        """Forget all contexts that begin with these tokens."""
        for tree in self._trees.values():
            node, known = tree.find(tokens)
            gone = [each for each in node.below() if each.value is not None] if known == len(tokens) else []
            for each in reversed(gone):
                self._drop(tree, each)
        self._forget_empty()


def _whole(node: ContextNode, known: int) -> Iterator[ContextNode]:
    """Yield the entries, the longest first, that `known` tokens down to a node begin with."""
    return (each for each in node.path() if each.value is not None and each.length <= known)


def _first_tokens(node: ContextNode, length: int) -> PiKVCache | None:
    """Return a fork of an entry that holds its first tokens only, None where it cannot be cropped to them."""
    entry = node.value
    assert entry is not None
    if length != node.length and not is_croppable(entry.cache):
        return None
    fork = entry.cache.fork()
    if length != node.length:
        fork.crop(length - node.length)
    return fork
