"""Which stored contexts to let go: the store's own policy, LRU, frequency alone, and Belady's optimum, on traces.

A context takes as many bytes as it has tokens that no other one has. Entries are in the store's radix tree, and go leaf
by leaf; what goes first is all that differs. Belady's (1966) leaf is the one that is next of use latest, which nobody
can know; in a tree it is no proven optimum, but a bound to look at.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.studies.store.request_traces import TRACES, Trace
from pikv_hf.store.context_entry import ContextEntry
from pikv_hf.store.eviction_value import ContextNode, entry_above, priority, saved_tokens
from pikv_hf.store.radix_tree import RadixTree, Tokens

Row = dict[str, Any]
#: The value by which the lowest goes first, of a node at a step of a trace.
Policy = Callable[["Simulated", ContextNode], float]

SHARES = (0.05, 0.1, 0.25, 0.5)
SEEDS = 5
METRIC = (
    "reused: share of the prompts' tokens that are known when they come, in percent, mean and range over seeds; a "
    "budget is a share of all tokens of a trace, common ones once"
)


class Simulated:
    """A store without K/V, which counts tokens.

    Parameters
    ----------
    trace : list
        Prompts and the texts that they become.
    budget : int
        The most tokens, shared ones once.
    policy : callable
        Says which entry goes first.
    """

    def __init__(self, trace: Trace, budget: int, policy: Policy) -> None:
        self.budget, self.policy, self.age, self.step = budget, policy, 0.0, 0
        self.tree: RadixTree[ContextEntry] = RadixTree()
        self.used: dict[ContextNode, int] = {}
        self.future = [np.array(prompt, dtype=np.int64) for prompt, _ in trace]
        self._trace, self._held = trace, 0

    def reused(self) -> float:
        """Return the share of the prompts' tokens that were known."""
        known = total = 0
        for step, (prompt, text) in enumerate(self._trace):
            self.step, tokens = step, self.future[step]
            node, found = self.tree.find(tokens)
            known, total = known + found, total + len(prompt)
            if found:
                holder = next(each for each in node.below() if each.value is not None)
                for each in holder.path():
                    if each.value is not None:
                        each.value.uses, each.value.age, self.used[each] = each.value.uses + 1, self.age, self.step
            self._put(np.array(text, dtype=np.int64))
        return known / total

    def _put(self, tokens: Tokens) -> None:
        node = self.tree.insert(tokens)
        if node.value is not None:
            return
        parting = node.parent
        for each in [node, *([parting] if parting is not self.tree.root and parting is not None else [])]:
            if each.value is None:
                # Nothing of it is looked at.
                each.value, self.used[each] = ContextEntry(cast(Any, None), age=self.age), self.step
        for each in list(node.path())[1:]:
            if each.value is not None and len(each.children) == 1:
                self.tree.remove(each)
        self._weigh()
        while self._held > self.budget:
            ends = [each for each in self.tree.nodes() if not each.children]
            last = min(ends, key=lambda each: self.policy(self, each))
            self.age = max(self.age, self.policy(self, last)) if self.policy is gdsf else self.age
            self.tree.remove(last)
            self._weigh()

    def _weigh(self) -> None:
        self._held = 0
        for node in self.tree.nodes():
            assert node.value is not None
            node.value.nbytes = saved_tokens(node)
            self._held += node.value.nbytes


def gdsf(store: Simulated, node: ContextNode) -> float:
    """The store's own; see :mod:`pikv_hf.store.eviction_value`."""
    return priority(node)


def lru(store: Simulated, node: ContextNode) -> float:
    """The one that was used longest ago."""
    return store.used[node]


def lfu(store: Simulated, node: ContextNode) -> float:
    """The one that was used least, and of those the oldest."""
    assert node.value is not None
    return node.value.uses + store.used[node] / 1e6


def belady(store: Simulated, node: ContextNode) -> float:
    """The one whose own tokens are next of use latest."""
    above = entry_above(node)
    begin = 0 if above is None else above.length
    tokens = node.tokens()[: begin + 1]
    for step in range(store.step + 1, len(store.future)):
        prompt = store.future[step]
        if len(prompt) > begin and prompt[begin] == tokens[begin]:
            return -step
    return -len(store.future)


POLICIES: dict[str, Policy] = {"gdsf": gdsf, "lru": lru, "lfu": lfu, "belady": belady}


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.store.eviction_study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--output", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    rows = [
        row_of(name, share, policy, [TRACES[name](seed, arguments.requests) for seed in range(arguments.seeds)])
        for name in TRACES
        for share in SHARES
        for policy in POLICIES
    ]
    if arguments.output is not None:
        write_rows(arguments.output, {"metric": METRIC, "seeds": arguments.seeds}, {"policies": rows})
    _show(Console(highlight=False), rows)


def row_of(name: str, share: float, policy: str, traces: Sequence[Trace]) -> Row:
    """Return what a policy reuses of traces of one kind under a budget."""
    found = []
    for trace in traces:
        tokens = len({block for _, text in trace for block in text})
        found.append(100 * Simulated(trace, int(share * tokens), POLICIES[policy]).reused())
    spread = [round(min(found), 2), round(max(found), 2)]
    return {"trace": name, "share": share, "policy": policy, "reused": sum(found) / len(found), "range": spread}


def _show(console: Console, rows: Sequence[Row]) -> None:
    cells = []
    for name in TRACES:
        for share in SHARES:
            own = {row["policy"]: row for row in rows if (row["trace"], row["share"]) == (name, share)}
            cells.append([name, f"{share:.0%}", *(f"{own[policy]['reused']:.1f}" for policy in POLICIES)])
    show_table(console, "Tokens of prompts that are reused (%)", ["trace", "budget", *POLICIES], cells)


if __name__ == "__main__":
    main()
