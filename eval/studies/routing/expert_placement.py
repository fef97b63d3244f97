"""Does expert placement help to choose pages on a pretrained model? What policies cover, by where tokens go.

On a pretrained model that was upcycled to a mixture of experts, whose router tells tokens apart. Coverage is measured
along exact answers, as `routing_study` has it; every sample is kept, and what was stopped goes on.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.quiet import quiet_transformers
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.routing.decode_trace import PLACEMENTS, SHARDS, SINKS, WINDOW, Layout, Reader, Rule
from pikv_hf.eval.studies.routing.routing_study import Figures, coverage_row, placement_rows
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
ADDED = ("covered_added", "covered_full_added")
METRIC = (
    "read: share of all pages that a step reads, those included that are read in any case; covered: share of the "
    "attention that these take in the same step with everything read; covered_full: the same of full pages alone; "
    "means over KV heads, layers and steps of exact answers. expert_minus_sequential: by how much more is read and "
    "covered with expert placement, on the same samples. Intervals are 95%, normal, over samples"
)


def rules(placement: str) -> list[Rule]:
    """Return what is compared with tokens placed so."""
    return [Rule(policy, share) for policy in POLICIES[placement] for share in SHARES]


def measure(reader: Reader, samples: Sequence[EvalSample], about: Row, file: Path) -> Iterator[str]:
    """Measure what the file lacks, and yield the id of each sample that was measured; `about` is kept with its rows."""
    known = [row for row in kept(file) if about.items() <= row.items()]
    for sample in samples:
        left = {
            placement: wanted
            for placement in PLACEMENTS
            if (wanted := [rule for rule in rules(placement) if not _has(known, sample, placement, rule)])
        }
        for placement, wanted in left.items():
            found = reader.coverage(sample, Layout(placement, PAGE_SIZE), wanted)
            own = about | {"id": sample.id, "placement": placement}
            keep(file, [own | {"rule": dataclasses.asdict(rule), "note": note} for rule, note in found.items()])
        if left:
            yield sample.id


def _has(rows: Iterable[Row], sample: EvalSample, placement: str, rule: Rule) -> bool:
    wanted = {"id": sample.id, "placement": placement, "rule": dataclasses.asdict(rule)}
    return any(wanted.items() <= row.items() for row in rows)


def figures(measured: Sequence[Row]) -> Figures:
    """Return notes by length, layout and rule, samples in the same order."""
    found: Figures = {}
    for row in sorted(measured, key=lambda row: str(row["id"])):
        layout, rule = Layout(row["placement"], PAGE_SIZE), Rule(**row["rule"])
        found.setdefault((row["tokens"], layout, rule), []).append(tuple(row["note"]))
    return found


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
    about = {"model": arguments.model, "tokens": arguments.length, "seed": arguments.seed}
    with quiet_transformers(), torch.inference_mode():
        reader = Reader(*load_model(arguments.model, "float32"))
        drawn = generate(reader.tokenizer, arguments.length, arguments.samples, tasks=TASKS, seed=arguments.seed)
        for sample in measure(reader, drawn, about, arguments.parts):
            console.print(sample)
    found = figures([row for row in kept(arguments.parts) if about.items() <= row.items()])
    rows, added = [coverage_row(*item) for item in found.items()], placement_rows(found, {})
    if arguments.output is not None:
        given = {"metric": METRIC, **about, "tasks": list(TASKS), "shards": SHARDS, "dtype": "float32"}
        given |= {"recent_window": WINDOW, "sink_tokens": SINKS, "samples": len(next(iter(found.values()), []))}
        write_rows(arguments.output, given, {"coverage": rows, "expert_minus_sequential": added})
    cells = [
        [
            f"{row['placement']} / {row['policy']} / {100 * row['share']:g}%",
            f"{100 * row['read']:.1f}",
            f"{100 * row['covered']:.1f} ± {100 * row['covered_ci']:.1f}",
            f"{100 * row['covered_full']:.1f} ± {100 * row['covered_full_ci']:.1f}",
        ]
        for row in rows
    ]
    columns = ["placement / policy / share", "read (%)", "covered (%)", "of full pages (%)"]
    show_table(console, "What is covered, by placement", columns, cells)
    cells = [
        [
            f"{row['policy']} / {100 * row['share']:g}%",
            *(
                f"{100 * row[name]:+.1f} ± {100 * row[f'{name}_ci']:.1f}"
                for name in ("covered_added", "covered_full_added")
            ),
        ]
        for row in added
    ]
    columns = ["policy / share", "covered (points)", "of full pages (points)"]
    show_table(console, "What expert placement adds to sequential placement", columns, cells)


if __name__ == "__main__":
    main()
