"""Which stored context goes first when a budget is exceeded: the one that saves the fewest tokens per byte and use.

Greedy-Dual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
Policy", 1998): an entry has the priority `age + uses * saved / bytes`. `saved` are the tokens that would have to be
read again without it, those behind the entry above it; `age` is the priority of the last entry that went before its
last use, so that those which are not used sink below new ones, with no clock. An entry goes before those above it,
which share its pages.
"""

from collections.abc import Iterable

from .context_entry import ContextEntry
from .radix_tree import Node, RadixTree

ContextNode = Node[ContextEntry]
ContextTree = RadixTree[ContextEntry]


def entry_above(node: ContextNode) -> ContextNode | None:
    """Return the next node above that holds an entry, None if there is none."""
    return next((each for each in node.path() if each is not node and each.value is not None), None)


def saved_tokens(node: ContextNode) -> int:
    """Return the tokens that only this entry, and those below it, save from being read."""
    above = entry_above(node)
    return node.length - (0 if above is None else above.length)


def gdsf(age: float, uses: int, saved: int, nbytes: int) -> float:
    """Return the priority of what was used so often, since it was put too, and saves so many tokens."""
    return age + (1 + uses) * saved / max(1, nbytes)


def priority(node: ContextNode) -> float:
    """Return the priority of an entry."""
    entry = node.value
    assert entry is not None
    return gdsf(entry.age, entry.uses, saved_tokens(node), entry.nbytes)


def first_to_go(trees: Iterable[ContextTree]) -> tuple[ContextTree, ContextNode] | None:
    """Return the entry of the lowest priority that has none below it, with its tree; None if there is no entry."""
    ends = [(tree, node) for tree in trees for node in tree.nodes() if not node.children]
    return min(ends, key=lambda end: priority(end[1]), default=None)
