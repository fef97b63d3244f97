"""What reading few pages costs a pretrained model in accuracy: policies, page sizes and lengths, by RULER scores.

The bundled model looks up in one layer; a pretrained one in many heads of many layers, some of which lose by what the
others bear. Each sample is kept as soon as it is measured: what was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.studies.routing.decode_trace import SINKS, WINDOW, Layout, Reader, Rule
from pikv_hf.eval.studies.routing.routing_study import interval
from pikv_hf.eval.tasks.ruler import generate

#: Those that SmolLM2-135M answers at these lengths.
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue")
SHARES = (0.25, 0.125)
METRIC = (
    "score: mean over tasks of RULER's score in percent of answers whose steps read only what a policy chooses, exact: "
    "that of the same samples with everything read; read: share of all pages that a step reads, those included that "
    "are read in any case, mean over KV heads, layers and steps. Intervals are 95%, normal, over paired samples. "
    "share_of_bytes: what a step reads of the bytes of K/V in bfloat16, with bounds or codes of all pages"
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What is measured together: policies at one length and page size, `samples` per task."""

    length: int
    page_size: int
    policies: tuple[str, ...]
    samples: int

    @property
    def name(self) -> str:
        """A name for a file."""
        return f"{self.length}-{self.page_size}-{'-'.join(self.policies)}"

    @property
    def rules(self) -> list[Rule]:
        """Return every policy at every share."""
        return [Rule(policy, share) for policy in self.policies for share in SHARES]


def plan(samples: int) -> list[Part]:
    """Return what is measured: the cell that decides with `samples` per task, others with fewer."""
    both = ("page_bound", "page_mass")
    return [
        Part(2048, 16, both, samples),
        Part(4096, 16, both, samples // 4),
        Part(2048, 8, both, samples // 2),
        Part(2048, 32, both, samples // 4),
        Part(2048, 16, ("adaptive", "oracle"), samples // 4),
    ]


def measure(reader: Reader, part: Part, seed: int, file: Path) -> Iterator[Row]:
    """Yield what each sample of a part scores and reads; those in the file are not measured anew."""
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    yield from known
    file.parent.mkdir(parents=True, exist_ok=True)
    samples = generate(reader.tokenizer, part.length, part.samples, tasks=TASKS, seed=seed)
    # Task after task, so that what was stopped has some of each.
    order = [samples[task * part.samples + number] for number in range(part.samples) for task in range(len(TASKS))]
    for sample in order[len(known) :]:
        exact, found = reader.scores(sample, Layout("sequential", part.page_size), part.rules)
        row = {"id": sample.id, "exact": exact, "found": [found[rule] for rule in part.rules]}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        yield row


def rows_of(part: Part, measured: Sequence[Row], dim: int) -> list[Row]:
    """Summarise a part: a row for each rule."""
    rows = []
    for place, rule in enumerate(part.rules):
        scores, exact = [row["found"][place][0] for row in measured], [row["exact"] for row in measured]
        differences = [score - full for score, full in zip(scores, exact, strict=True)]
        read = statistics.fmean(row["found"][place][1] for row in measured)
        rows.append({
            "tokens": part.length,
            "page_size": part.page_size,
            "policy": rule.name,
            "share": rule.share,
            "samples": len(measured),
            "read": read,
            "share_of_bytes": None if rule.name == "oracle" else read + known_bytes(rule.name, part.page_size, dim),
            "score": statistics.fmean(scores),
            "exact": statistics.fmean(exact),
            "difference": statistics.fmean(differences),
            "difference_ci": interval(differences),
        })  # fmt: skip
    return rows


def known_bytes(policy: str, page_size: int, dim: int) -> float:
    """Return what ranking reads of each page, as a share of its keys and values in bfloat16, `dim` channels each."""
    if policy != "page_mass":
        return 1 / page_size
    # Codes, a spread and a floor per channel; of four channels their number and four more bits per token.
    bits = 2 * page_size * dim + 24 * dim + 4 * (16 + 4 * page_size)
    return bits / (2 * 16 * page_size * dim)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.routing.pretrained_study", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a name, as of pikv eval")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--samples", type=int, default=16, help="samples per task in the largest part")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep samples in")
    arguments = parser.parse_args(argv)
    console, reader = Console(highlight=False), Reader(arguments.model)
    text = reader.model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows: list[Row] = []
    for part in plan(arguments.samples):
        measured: list[Row] = []
        for row in measure(reader, part, arguments.seed, arguments.parts / f"{part.name}.jsonl"):
            measured.append(row)
            console.print(f"{part.name}: {len(measured)} of {part.samples * len(TASKS)}: {row}", soft_wrap=True)
        rows += rows_of(part, measured, dim)
        if arguments.output is not None:
            about = {"metric": METRIC, "recent_window": WINDOW, "sink_tokens": SINKS, "placement": "sequential"}
            about |= {"dtype": "float32", "tasks": list(TASKS), "seed": arguments.seed}
            write_rows(arguments.output, about, {"ruler": rows})
    cells = [
        [
            f"{row['tokens']:,} / {row['page_size']} / {row['policy']}",
            f"{100 * row['share']:g}%",
            str(row["samples"]),
            f"{100 * row['read']:.1f}",
            f"{row['score']:.1f}",
            f"{row['difference']:+.1f} ± {row['difference_ci']:.1f}",
        ]
        for row in rows
    ]
    show_table(console, "RULER", ["tokens / page / policy", "share", "samples", "read (%)", "score", "- exact"], cells)


if __name__ == "__main__":
    main()
