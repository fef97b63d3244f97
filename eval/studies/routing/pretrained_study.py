"""What reading few pages costs a pretrained model in accuracy: policies, page sizes and lengths, by RULER scores.

The bundled model looks up in one layer; a pretrained one in many heads of many layers, some of which lose by what the
others bear. Each sample is kept as soon as it is measured: what was stopped goes on where it was.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.protocol import Asker
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.routing.decode_trace import PLACEMENTS, SINKS, WINDOW, Rule
from pikv_hf.eval.studies.routing.routing_study import interval
from pikv_hf.eval.tasks.ruler import generate, score
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.routing.page_router import PageRouter, make_page_router

#: Those that SmolLM2-135M answers at these lengths.
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue")
SHARES = (0.25, 0.125)
#: Samples of a task that are read at once.
BATCH = 4
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
        Part(2048, 16, ("adaptive",), samples // 4),
    ]


def measure(asker: Asker, part: Part, seed: int, file: Path) -> Iterator[Row]:
    """Yield what each sample of a part scores and reads; those in the file are not measured anew."""
    known = kept(file)
    yield from known
    samples = generate(asker.tokenizer, part.length, part.samples, tasks=TASKS, seed=seed)
    # Some of each task, so that what was stopped has about as many of all.
    batches = [
        samples[task * part.samples :][first : min(first + BATCH, part.samples)]
        for first in range(0, part.samples, BATCH)
        for task in range(len(TASKS))
    ]
    for batch in batches:
        if any(sample.id == row["id"] for sample in batch for row in known):
            continue
        rows = measured(asker, batch, part)
        keep(file, rows)
        yield from rows


def measured(asker: Asker, batch: Sequence[EvalSample], part: Part) -> list[Row]:
    """Answer a batch of samples with everything read and by every rule, from one reading of their contexts."""
    encoded = [asker.encode(sample) for sample in batch]
    layout = {"page_size": part.page_size, "recent_window": WINDOW, "sink_tokens": SINKS, **PLACEMENTS["sequential"]}
    cache = PiKVCache.for_model(asker.model, **layout)
    seen = asker.read_batch(encoded, cache)
    rows: list[Row] = [{"id": sample.id, "task": sample.task, "found": []} for sample in batch]
    for rule in [None, *part.rules]:
        twin = cache.fork()
        further = statistics.fmean(own.question.shape[1] for own in encoded) / part.page_size
        routers = [] if rule is None else [route(layer, rule, further) for layer in twin.layers]
        for row, sample, own, tokens in zip(rows, batch, encoded, asker.answer_batch(encoded, twin, seen), strict=True):
            points = 100 * next(iter(score(sample, asker.text_of(own, tokens)).values()))
            if rule is None:
                row["exact"] = points
            else:
                read = [int(router.counts.read) / max(1, router.counts.reachable) for router in routers]
                row["found"].append((points, statistics.fmean(read)))
    return rows


def route(layer: PiKVLayer, rule: Rule, further: float) -> PageRouter:
    """Let the steps of a layer read the share that a rule says of its pages, of which each row will have some more."""
    assert layer.table is not None
    rows = len(layer.table.rows)
    always = layer.table.view.always_read / rows
    pages = layer.table.view.full_pages().page_count / rows + always + further
    most = max(1, round(rule.share * pages - always))
    router = make_page_router(
        PiKVConfig(routing=rule.name, max_pages=most, recent_window=WINDOW, sink_tokens=SINKS, coverage=1.0)
    )
    assert router is not None
    layer.parts[0].page_router = router
    return router


def rows_of(part: Part, measured: Sequence[Row], dim: int) -> list[Row]:
    """Summarise a part: a row for each rule."""
    rows = []
    for place, rule in enumerate(part.rules):
        scores, exact = [row["found"][place][0] for row in measured], [row["exact"] for row in measured]
        differences = [score - full for score, full in zip(scores, exact, strict=True)]
        read = statistics.fmean(row["found"][place][1] for row in measured if row["found"][place][1])
        rows.append({
            "tokens": part.length,
            "page_size": part.page_size,
            "policy": rule.name,
            "share": rule.share,
            "samples": len(measured),
            "read": read,
            "share_of_bytes": read + known_bytes(rule.name, part.page_size, dim),
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a name, as of pikv eval")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--samples", type=int, default=16, help="samples per task in the largest part")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep samples in")
    parser.add_argument("--only", nargs="*", help="parts to measure, by name; those kept are taken in any case")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    asker = Asker(*load_model(arguments.model, "float32"))
    text = asker.model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows: list[Row] = []
    for part in plan(arguments.samples):
        file, done = arguments.parts / f"{part.name}.jsonl", list[Row]()
        goes_on = arguments.only is None or part.name in arguments.only
        for row in measure(asker, part, arguments.seed, file) if goes_on else kept(file):
            done.append(row)
            console.print(f"{part.name}: {len(done)} of {part.samples * len(TASKS)}: {row}", soft_wrap=True)
        rows += rows_of(part, done, dim) if done else []
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
