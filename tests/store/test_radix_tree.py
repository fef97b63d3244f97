"""The radix tree against a plain set of sequences."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.store.radix_tree import Node, RadixTree

Sequence = tuple[int, ...]
SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "remove"]), SEQUENCES), max_size=30)


def array(sequence: Sequence) -> np.ndarray:
    return np.array(sequence, dtype=np.int64)


def begins(sequence: Sequence, others: set[Sequence]) -> int:
    """Return how many of its first tokens any other sequence begins with."""
    return max((n for other in others for n in range(len(sequence) + 1) if other[:n] == sequence[:n]), default=0)


def check_shape(tree: RadixTree[Sequence]) -> None:
    for node in tree.root.below():
        for first, child in node.children.items():
            assert child.parent is node
            assert first == child.edge[0]
            assert child.length == node.length + len(child.edge)
        assert node is tree.root or node.value is not None or len(node.children) > 1


@given(STEPS, st.lists(SEQUENCES, max_size=5))
def test_it_finds_the_longest_prefix_of_any_sequence(steps: list[tuple[str, Sequence]], asked: list[Sequence]) -> None:
    tree: RadixTree[Sequence] = RadixTree()
    known: dict[Sequence, Node[Sequence]] = {}
    for what, sequence in steps:
        if what == "put":
            known[sequence] = tree.insert(array(sequence))
            known[sequence].value = sequence
        elif sequence in known:
            tree.remove(known.pop(sequence))
        check_shape(tree)
        assert {node.value for node in tree.nodes()} == set(known)
    for sequence in [*asked, *known]:
        node, length = tree.find(array(sequence))
        assert length == begins(sequence, set(known))
        assert node.length >= length
        assert tuple(node.tokens()[:length].tolist()) == sequence[:length]
        assert node.parent is None or node.parent.length < length
    for sequence, node in known.items():
        assert tuple(node.tokens().tolist()) == sequence == node.value
