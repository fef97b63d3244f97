"""What placements keep together and how evenly they fill devices: PiKV's original formula and this project's.

Traces are of the bundled model on synthetic haystacks, and made up with Zipf-distributed experts. `docs/placement.md`
says where the original's formula is from.
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pikv_hf import PiKVConfig, attach
from pikv_hf.eval.demo.caches import pikv_cache
from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.demo.routing_recorder import record_trace
from pikv_hf.eval.demo.task import build_task
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.planning.simulate.placements import (
    PLACEMENTS,
    Placed,
    devices_per_expert,
    make_placed,
    original_shards,
    shared_bits,
    top_share,
)
from pikv_hf.planning.simulate.routing_trace import Popularity, RoutingTrace, synthetic_trace
from pikv_hf.sharding.load_balancing import imbalance

#: Numbers of devices, powers of two and others.
COUNTS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
PAGE_SIZE = 32
#: Skews of traces that are made up, with so many experts, layers and tokens.
SKEWS, EXPERTS, LAYERS, TOKENS = (0.0, 0.5, 1.0, 1.5), 128, 4, 131072
#: Devices and groups of positions for the table of the formula's other parameter.
GROUPS_DEVICES, GROUPS = 16, (1, 2, 4, 8, 16)
METRIC = (
    "top_share: share of an expert's tokens on the device that has most of them; devices: how many hold any of them; "
    "means over tokens and layers. bits: mutual information of expert and device, mean over layers; those of all are "
    "the entropy of the experts. balance: tokens of the fullest device over the mean, mean over layers. Each trace is "
    "read in chunks of 2,048 tokens at most, or a sequence at a time, after which balanced and divided may plan anew"
)

Row = dict[str, Any]
#: Sequences, each `(layers, tokens)` experts whose positions begin at 0, and the number of experts.
Sequences = tuple[list[np.ndarray], int]


def recorded(sequences: int, tokens: int) -> Sequences:
    """Return what the bundled model's routers chose on haystacks of so many tokens, with questions and answers."""
    found: list[RoutingTrace] = []
    for seed in range(sequences):
        task = build_task(DemoOptions(tokens=tokens, seed=seed))
        with attach(task.model) as attached:
            found.append(record_trace(task, pikv_cache(task.model, PiKVConfig()), attached.expert_routers, 48))
    return [trace.experts.astype(np.int64) for trace in found], found[0].num_experts


def made_up(skew: float) -> Sequences:
    """Return a trace of this skew as one sequence."""
    trace = synthetic_trace(LAYERS, EXPERTS, TOKENS, Popularity(skew, stickiness=0.3), seed=0)
    return [trace.experts.astype(np.int64)], EXPERTS


def place(placed: Placed, sequences: Iterable[np.ndarray], chunk: int = 2048) -> Placed:
    """Store sequences, and let the placement plan anew after each chunk."""
    for experts in sequences:
        for start in range(0, experts.shape[1], chunk):
            positions = np.arange(start, min(start + chunk, experts.shape[1]))
            placed.add(positions, experts[:, positions])
            placed.settle()
    return placed


def figures(stock: np.ndarray) -> Row:
    """Return what is kept together and how evenly, of a stock `(layers, experts, devices)`."""
    return {
        "top_share": top_share(stock),
        "devices": devices_per_expert(stock),
        "bits": statistics.fmean(shared_bits(layer) for layer in stock),
        "balance": statistics.fmean(imbalance(layer.sum(axis=0)) for layer in stock),
    }


def entropy(sequences: Sequence[np.ndarray], experts: int) -> float:
    """Return the bits that an expert's number holds, mean over layers."""
    every = np.concatenate(sequences, axis=1)
    shares = np.stack([np.bincount(row, minlength=experts) for row in every]) / every.shape[1]
    return float(-np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-300)), 0).sum(axis=1).mean())


def study(name: str, given: Sequences) -> Iterator[Row]:
    """Yield a row for each placement and number of devices."""
    sequences, experts = given
    for placement in PLACEMENTS:
        for count in COUNTS:
            placed = place(make_placed(placement, len(sequences[0]), experts, count, PAGE_SIZE), sequences)
            yield {"trace": name, "placement": placement, "devices_given": count, **figures(placed.stock)}


class Grouped(Placed):
    """The original's formula with another number of position groups than devices."""

    groups = 1

    def place(self, layer: int, positions: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """Return the device of each token, `(n,)`."""
        return original_shards(positions, experts, self.devices, self.groups)


def group_rows(name: str, given: Sequences) -> Iterator[Row]:
    """Yield a row for each number of position groups of the original's formula."""
    sequences, experts = given
    for groups in GROUPS:
        placed = Grouped(len(sequences[0]), experts, GROUPS_DEVICES, PAGE_SIZE)
        placed.groups = groups
        place(placed, sequences)
        yield {"trace": name, "devices_given": GROUPS_DEVICES, "token_groups": groups, **figures(placed.stock)}


def main() -> None:
    """Run the study and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="haystacks of the bundled model")
    parser.add_argument("--tokens", type=int, default=2048, help="of each haystack")
    parser.add_argument("--output", type=Path, default=Path("eval/results/placement.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = recorded(options.sequences, options.tokens)
    traces = {"bundled model": real, **{f"Zipf {skew:g}": made_up(skew) for skew in SKEWS}}
    about = [
        {
            "trace": name,
            "sequences": len(given[0]),
            "tokens": sum(sequence.shape[1] for sequence in given[0]),
            "layers": len(given[0][0]),
            "experts": given[1],
            "bits": entropy(*given),
        }
        for name, given in traces.items()
    ]
    rows = [row for name, given in traces.items() for row in study(name, given)]
    groups = [row for name in ("bundled model", "Zipf 1") for row in group_rows(name, traces[name])]
    write_rows(
        options.output,
        {"metric": METRIC, "page_size": PAGE_SIZE},
        {"traces": about, "placements": rows, "original_token_groups": groups},
    )
    console = Console()
    for name in traces:
        show(console, name, [row for row in rows if row["trace"] == name])


def show(console: Console, name: str, rows: Sequence[Row]) -> None:
    """Print one table for each figure: placements in rows, numbers of devices in columns."""
    for figure in ("top_share", "devices", "bits", "balance"):
        lines = []
        for placement in PLACEMENTS:
            own = {row["devices_given"]: row[figure] for row in rows if row["placement"] == placement}
            lines.append([placement, *(f"{own[count]:.2f}" for count in COUNTS)])
        show_table(console, f"{name}: {figure}", ["placement", *map(str, COUNTS)], lines)


if __name__ == "__main__":
    main()
