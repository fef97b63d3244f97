"""What routing covers and what it costs in accuracy: policies, placements and shares of pages on the bundled model.

Coverage is measured along exact answers: each step reads everything, and what each rule would have read is weighed by
the attention that it takes in that very step. RULER scores are of answers whose steps read only what a rule chooses.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.experiments.results import show_table, write_rows
from pikv_hf.eval.experiments.routing_trace import PLACEMENTS, SHARDS, SINKS, WINDOW, Layout, Note, Reader, Rule
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.sample import EvalSample

LENGTHS, PAGE_SIZES, SHARES = (1024, 2048), (8, 16), (0.5, 0.25, 0.125, 0.0625)
#: `adaptive` with one of these targets chooses how many pages it reads.
TARGETS = (0.8, 0.9, 0.95, 0.99)
METRIC = (
    "read: share of all pages that a step reads, those included that are read in any case; covered: share of the "
    "attention that these take in the same step with everything read; covered_full: the same of full pages alone; "
    "means over KV heads, layers and the decoding steps of exact answers, query heads of a KV head averaged. score: "
    "mean over tasks of RULER's score in percent, exact: that of the same samples with everything read. Intervals are "
    "95%, normal, over samples; differences are paired by sample"
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """RULER scores to measure: every rule of a placement, at one length and page size.

    Attributes
    ----------
    rules : dict
        By placement.
    samples : int
        Per task.
    first : int
        Samples per task to leave out, measured by another part.
    one_by_one : bool
        Whether the tokens of the question are routed too, one at a time, instead of read in one call that looks at
        everything.
    """

    length: int
    page_size: int
    rules: dict[str, list[Rule]]
    samples: int
    first: int = 0
    one_by_one: bool = False


def _rules(names: Iterable[str], shares: Iterable[float] = SHARES) -> list[Rule]:
    return [Rule(name, share) for name in names for share in shares]


def _key_cells(length: int, page_size: int, samples: int, first: int = 0, *, one_by_one: bool = False) -> Part:
    rules = _rules(("page_bound", "adaptive"), SHARES[1:])
    return Part(length, page_size, {"expert": rules, "sequential": rules}, samples, first, one_by_one)


def plan(samples: int) -> list[Part]:
    """Return what is measured for RULER with `samples` per task, the cells that matter with four times as many."""
    targets = [Rule("adaptive", 1.0, target) for target in TARGETS[1:]]
    controls = _rules(("random", "oracle"), SHARES[1:3])
    every = {
        "expert": _rules(("page_bound", "adaptive", "expert_topk", "hierarchical")) + controls + targets,
        # The pages of "hash" are these: only what looks at shards differs there.
        "sequential": _rules(("page_bound", "adaptive", "expert_topk")) + controls + targets,
        "hash": _rules(("expert_topk", "hierarchical"), SHARES[:3]),
    }
    return [
        Part(2048, 8, every, samples),
        _key_cells(2048, 8, 3 * samples, samples),
        _key_cells(2048, 16, samples),
        _key_cells(2048, 8, samples, one_by_one=True),
        Part(1024, 8, every, samples),
        _key_cells(1024, 16, samples),
    ]


def coverage_rules(placement: str) -> list[Rule]:
    """Return the rules whose coverage is measured."""
    names = ["page_bound", "adaptive", "expert_topk", "random", "oracle"]
    if placement != "sequential":
        names.append("hierarchical")
    of_full = [Rule(name, share, of_full=True) for name in ("page_bound", "adaptive", "oracle") for share in SHARES[1:]]
    return _rules(names) + [Rule("adaptive", 1.0, target) for target in TARGETS] + of_full


def interval(figures: Sequence[float]) -> float:
    """Return half the width of the 95% interval of a mean."""
    return 1.96 * statistics.stdev(figures) / len(figures) ** 0.5 if len(figures) > 1 else 0.0


def _cell(length: int, layout: Layout, rule: Rule) -> Row:
    row: Row = {"tokens": length, "page_size": layout.page_size, "placement": layout.placement, "policy": rule.name}
    if rule.coverage < 1:
        return {**row, "target": rule.coverage}
    return {**row, "share_of_full" if rule.of_full else "share": rule.share}


Figures = dict[tuple[int, Layout, Rule], list[Any]]


def measure_coverage(reader: Reader, samples: int, seed: int) -> Iterator[Figures]:
    """Yield, for one length, page size and placement after the other, a :class:`Note` per sample for each rule."""
    for length in LENGTHS:
        prompts = reference.generate(length, samples, seed=seed)
        for page_size in PAGE_SIZES:
            for placement in PLACEMENTS:
                layout, rules = Layout(placement, page_size), coverage_rules(placement)
                notes = [reader.coverage(sample, layout, rules) for sample in prompts]
                yield {(length, layout, rule): [note[rule] for note in notes] for rule in rules}


def coverage_row(key: tuple[int, Layout, Rule], notes: Sequence[Note]) -> Row:
    """Summarise one rule."""
    row = _cell(*key)
    for name in ("read", "covered", "covered_full"):
        figures = [getattr(note, name) for note in notes]
        row |= {name: statistics.fmean(figures), f"{name}_ci": interval(figures)}
    return row


def measure_ruler(reader: Reader, part: Part, seed: int) -> Figures:
    """Return for each rule, and under the rule None, a triple per sample: score, exact score, share of pages read."""
    found: Figures = {}
    for sample in _samples(part, seed):
        for placement, rules in part.rules.items():
            layout = Layout(placement, part.page_size)
            scores = reader.scores(sample, layout, rules, one_by_one=part.one_by_one)
            for rule in rules:
                triple = scores[rule][0], scores[None][0], scores[rule][1]
                found.setdefault((part.length, layout, rule), []).append(triple)
    return found


def _samples(part: Part, seed: int) -> list[EvalSample]:
    many = reference.generate(part.length, part.first + part.samples, seed=seed)
    return [sample for index, sample in enumerate(many) if index % (part.first + part.samples) >= part.first]


def ruler_row(key: tuple[int, Layout, Rule], triples: Sequence[tuple[float, float, float]], *, routed: bool) -> Row:
    """Summarise one rule; `routed` says that the question was routed too."""
    scores, exact, read = zip(*triples, strict=True)
    differences = [score - full for score, full in zip(scores, exact, strict=True)]
    return {
        **_cell(*key),
        "question": "routed" if routed else "read in one call",
        "samples": len(triples),
        "read": statistics.fmean(share for share in read if share == share),
        "score": statistics.fmean(scores),
        "exact": statistics.fmean(exact),
        "difference": statistics.fmean(differences),
        "difference_ci": interval(differences),
    }


def placement_rows(coverage: Figures, ruler: Figures) -> list[Row]:
    """Return what expert placement adds to sequential placement, on the same samples, pages of the same size."""
    rows = []
    for (length, layout, rule), notes in coverage.items():
        other = coverage.get((length, Layout("sequential", layout.page_size), rule))
        if layout.placement != "expert" or other is None or rule.name == "random":
            continue
        row = _cell(length, layout, rule)
        for name in ("read", "covered", "covered_full"):
            added = [getattr(a, name) - getattr(b, name) for a, b in zip(notes, other, strict=True)]
            row |= {f"{name}_added": statistics.fmean(added), f"{name}_added_ci": interval(added)}
        mine, theirs = (
            ruler.get((length, Layout(name, layout.page_size), rule), []) for name in ("expert", "sequential")
        )
        if mine and theirs:
            added = [a[0] - b[0] for a, b in zip(mine, theirs, strict=True)]
            row |= {"score_added": statistics.fmean(added), "score_added_ci": interval(added), "samples": len(added)}
        rows.append({key: value for key, value in row.items() if key != "placement"})
    return rows


class Study:
    """What has been measured so far, written to a file after every part."""

    def __init__(self, file: Path | None, arguments: argparse.Namespace) -> None:
        self._file = file
        self.coverage: Figures = {}
        self.ruler: Figures = {}
        self.routed: Figures = {}
        self._about = {
            "metric": METRIC,
            "recent_window": WINDOW,
            "sink_tokens": SINKS,
            "shards": {name: options["num_shards"] for name, options in PLACEMENTS.items()},
            "experts": SHARDS,
            "dtype": "float32",
            "coverage_samples_per_task": arguments.coverage_samples,
            "ruler_samples_per_task": arguments.samples,
            "tasks": list(reference.TASKS),
            "seed": arguments.seed,
        }

    def tables(self) -> dict[str, list[Row]]:
        """Return all rows."""
        ruler = [ruler_row(key, found, routed=False) for key, found in self.ruler.items()]
        ruler += [ruler_row(key, found, routed=True) for key, found in self.routed.items()]
        return {
            "coverage": [coverage_row(*item) for item in self.coverage.items()],
            "ruler": ruler,
            "expert_minus_sequential": placement_rows(self.coverage, self.ruler),
        }

    def save(self) -> None:
        """Write all rows."""
        if self._file is not None:
            write_rows(self._file, self._about, self.tables())


def _show(console: Console, tables: dict[str, list[Row]]) -> None:
    for length in LENGTHS:
        for page_size in PAGE_SIZES:
            rows = [r for r in tables["coverage"] if (r["tokens"], r["page_size"]) == (length, page_size)]
            body = [_covered_cells(placement, rows) for placement in PLACEMENTS]
            columns = ["covered (%) at pages read (%)", *(f"{100 * share:g}%" for share in SHARES)]
            lines = [line for part in body for line in part]
            show_table(console, f"{length:,} tokens, pages of {page_size}", columns, lines)
    scores = [
        [
            f"{r['tokens']:,} / {r['page_size']} / {r['placement']} / {r['policy']}",
            f"{100 * r.get('share', r.get('target', 1)):g}%{' target' if 'target' in r else ''}",
            r["question"],
            str(r["samples"]),
            f"{100 * r['read']:.1f}",
            f"{r['score']:.1f}",
            f"{r['difference']:+.1f} ± {r['difference_ci']:.1f}",
        ]
        for r in tables["ruler"]
    ]
    columns = ["tokens / page / placement / policy", "share", "question", "samples", "read (%)", "RULER", "- exact"]
    show_table(console, "RULER", columns, scores)


def _covered_cells(placement: str, rows: Sequence[Row]) -> list[list[str]]:
    mine = [row for row in rows if row["placement"] == placement and "share" in row]
    found = {(row["policy"], row["share"]): row for row in mine}
    return [
        [f"{placement}, {name}"]
        + [f"{100 * found[name, s]['covered']:.1f} at {100 * found[name, s]['read']:.1f}" for s in SHARES]
        for name in dict.fromkeys(row["policy"] for row in mine)
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its tables and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.experiments.routing_study", description=__doc__)
    parser.add_argument("--output", type=Path, help="file for the results, such as eval/results/routing.json")
    parser.add_argument("--coverage-samples", type=int, default=4, help="samples per task and length for coverage")
    parser.add_argument("--samples", type=int, default=10, help="samples per task for RULER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, reader, study = Console(highlight=False), Reader(), Study(arguments.output, arguments)
    with console.status("measuring"):
        for found in measure_coverage(reader, arguments.coverage_samples, arguments.seed):
            study.coverage |= found
            study.save()
        for part in plan(arguments.samples):
            into = study.routed if part.one_by_one else study.ruler
            for key, triples in measure_ruler(reader, part, arguments.seed).items():
                into.setdefault(key, []).extend(triples)
            study.save()
    _show(console, study.tables())
    if arguments.output is not None:
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
