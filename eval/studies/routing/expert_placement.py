"""Does expert placement help to choose pages on a pretrained model? What policies cover, by where tokens go.

On a pretrained model that was upcycled to a mixture of experts, whose router tells tokens apart. Coverage is measured
along exact answers, as `routing_study` has it; every sample is kept, and what was stopped goes on.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.quiet import quiet_transformers
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.routing.decode_trace import PLACEMENTS, SHARDS, SINKS, WINDOW, Layout, Reader, Rule
from pikv_hf.eval.studies.routing.routing_study import coverage_row
from pikv_hf.eval.tasks.ruler import generate
from pikv_hf.eval.tasks.sample import EvalSample

Row = dict[str, Any]

LENGTH, PAGE_SIZE, SHARES = 2048, 16, (0.25, 0.125)
TASKS = ("niah_single_2", "niah_multikey_1")
#: `hash` deals the pages of `sequential` out to shards: only policies that look at shards tell them apart.
POLICIES = {
    "expert": ("page_bound", "expert_topk", "hierarchical", "random", "oracle"),
    "hash": ("expert_topk", "hierarchical"),
    "sequential": ("page_bound", "random", "oracle"),
}
METRIC = (
    "read: share of all pages that a step reads, those included that are read in any case; covered: share of the "
    "attention that these take in the same step with everything read; covered_full: the same of full pages alone; "
    "means over KV heads, layers and steps of exact answers. expert_minus: by how much expert placement covers more, "
    "on the same samples. Intervals are 95%, normal, over samples"
)


def rules(placement: str) -> list[Rule]:
    """Return what is compared with tokens placed so."""
    return [Rule(policy, share) for policy in POLICIES[placement] for share in SHARES]


def measure(reader: Reader, samples: Sequence[EvalSample], length: int, file: Path) -> Iterator[str]:
    """Measure what the file lacks, and yield the id of each sample that was."""
    known = {(row["id"], row["placement"]) for row in kept(file)}
    for sample in samples:
        for placement in PLACEMENTS:
            if (sample.id, placement) in known:
                continue
            found = reader.coverage(sample, Layout(placement, PAGE_SIZE), rules(placement))
            about = {"id": sample.id, "placement": placement, "tokens": length}
            keep(file, [about | {"rule": dataclasses.asdict(rule), "note": note} for rule, note in found.items()])
        yield sample.id


def rows_of(measured: Sequence[Row]) -> list[Row]:
    """Return a row for each placement and rule."""
    notes: dict[tuple[int, Layout, Rule], dict[str, tuple[float, ...]]] = {}
    for row in measured:
        key = row["tokens"], Layout(row["placement"], PAGE_SIZE), Rule(**row["rule"])
        notes.setdefault(key, {})[row["id"]] = tuple(row["note"])
    rows = []
    for (length, layout, rule), of in notes.items():
        row = coverage_row((length, layout, rule), list(of.values())) | {"samples": len(of)}
        expert = notes.get((length, Layout("expert", PAGE_SIZE), rule), {})
        both = of.keys() & expert.keys()
        if layout.placement != "expert" and both:
            # The figure of a note that comes second: what is covered.
            row["expert_minus"] = sum(expert[name][1] - of[name][1] for name in both) / len(both)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m pikv_hf.eval.studies.routing.expert_placement", description=__doc__
    )
    parser.add_argument("--model", default="smollm2-moe", help="as of pikv eval")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--samples", type=int, default=8, help="per task")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--parts", type=Path, required=True, help="file to keep samples in")
    parser.add_argument("--output", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    with quiet_transformers(), torch.inference_mode():
        reader = Reader(*load_model(arguments.model, "float32"))
        drawn = generate(reader.tokenizer, arguments.length, arguments.samples, tasks=TASKS, seed=arguments.seed)
        for sample in measure(reader, drawn, arguments.length, arguments.parts):
            console.print(sample)
    rows = rows_of(kept(arguments.parts))
    if arguments.output is not None:
        about = {"metric": METRIC, "model": arguments.model, "tasks": list(TASKS), "shards": SHARDS, "dtype": "float32"}
        write_rows(arguments.output, about | {"recent_window": WINDOW, "sink_tokens": SINKS}, {"coverage": rows})
    cells = [
        [
            f"{row['placement']} / {row['policy']}",
            f"{100 * row['read']:.1f}",
            f"{100 * row['covered']:.1f} ± {100 * row['covered_ci']:.1f}",
            f"{100 * row['covered_full']:.1f}",
            f"{100 * row['expert_minus']:+.1f}" if "expert_minus" in row else "",
        ]
        for row in rows
    ]
    columns = ["placement / policy", "read (%)", "covered (%)", "of full pages (%)", "expert placement (points)"]
    show_table(console, "What is covered, by placement", columns, cells)


if __name__ == "__main__":
    main()
