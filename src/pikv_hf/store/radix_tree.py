"""A radix tree over token ids: the longest known prefix of a prompt, in one walk over its tokens."""

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Value = TypeVar("Value")


class Node(Generic[Value]):
    """An end of a known sequence, or where two of them part.

    Parameters
    ----------
    edge : numpy.ndarray
        `(n,)` int64, the tokens between the parent and this node; one at least, but for the root.
    parent : Node or None
        None for the root.

    Attributes
    ----------
    length : int
        Tokens from the root to this node.
    children : dict of int to Node
        By the first token of their edges.
    value : object or None
        What is stored of the tokens up to here.
    """

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, edge: Tokens, parent: "Node[Value] | None") -> None:
        self.edge, self.parent = edge, parent
        self.length: int = len(edge) + (0 if parent is None else parent.length)
        self.children: dict[int, Node[Value]] = {}
        self.value: Value | None = None

    def path(self) -> "Iterator[Node[Value]]":
        """Yield this node and those above it, the root left out."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def below(self) -> "Iterator[Node[Value]]":
        """Yield this node and all nodes below it, parents before their children."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def tokens(self) -> Tokens:
        """Return the tokens from the root to this node, `(length,)`."""
        edges = [node.edge for node in self.path()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *reversed(edges)])


class RadixTree(Generic[Value]):
    """Sequences of token ids that share their prefixes.

    Every node but the root has a value, or parts at least two children.

    Attributes
    ----------
    root : Node
        Of the empty sequence.
    """

    def __init__(self) -> None:
        self.root: Node[Value] = Node(np.zeros(0, dtype=np.int64), None)

    def find(self, tokens: Tokens) -> tuple[Node[Value], int]:
        """Return how many of the first tokens are known, and the highest node at or below which they are.

        Whatever lies below the node begins with these tokens. The node is the root where none are known.
        """
        node, known = self.root, 0
        while known < len(tokens) and (child := node.children.get(int(tokens[known]))) is not None:
            shared = _shared(child.edge, tokens[known:])
            node, known = child, known + shared
            if shared < len(child.edge):
                break
        return node, known

    def insert(self, tokens: Tokens) -> Node[Value]:
        """Return the node at the end of these tokens, made where there is none; its value is for the caller to set.

        An edge that they leave half way is split by a node without a value.
        """
        node, known = self.find(tokens)
        if known < node.length:
            node = self._split(node, known)
        if known < len(tokens):
            child: Node[Value] = Node(tokens[known:].copy(), node)
            node.children[int(tokens[known])] = child
            node = child
        return node

    def remove(self, node: Node[Value]) -> None:
        """Forget the value of a node, and the node where nothing parts at it; what lies below stays."""
        node.value = None
        while node.parent is not None and node.value is None and len(node.children) < 2:
            parent = node.parent
            if node.children:
                self._join(node)
                return
            del parent.children[int(node.edge[0])]
            node = parent

    def nodes(self) -> Iterator[Node[Value]]:
        """Yield all nodes with a value, parents before their children."""
        return (node for node in self.root.below() if node.value is not None)

    def _split(self, node: Node[Value], length: int) -> Node[Value]:
        """Put a node in the middle of an edge, at `length` tokens from the root, and return it."""
        assert node.parent is not None
        at = length - node.parent.length
        middle: Node[Value] = Node(node.edge[:at].copy(), node.parent)
        node.parent.children[int(node.edge[0])] = middle
        node.edge, node.parent = node.edge[at:].copy(), middle
        middle.children[int(node.edge[0])] = node
        return middle

    def _join(self, node: Node[Value]) -> None:
        """Leave out a node with one child."""
        assert node.parent is not None
        (child,) = node.children.values()
        child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
        node.parent.children[int(child.edge[0])] = child


def _shared(edge: Tokens, tokens: Tokens) -> int:
    """Return how many tokens two sequences begin with alike."""
    length = min(len(edge), len(tokens))
    differ = edge[:length] != tokens[:length]
    return int(differ.argmax()) if differ.any() else length
