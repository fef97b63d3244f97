"""What routing covers and what it costs in accuracy: policies, placements and shares of pages on the bundled model.

Coverage is measured along exact answers: each step reads everything, and what each rule would have read is weighed by
the attention that it takes in that very step. RULER scores are of answers whose steps read only what a rule chooses.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.studies.routing.decode_trace import PLACEMENTS, SINKS, WINDOW, Layout, Note, Reader, Rule
from pikv_hf.eval.tasks import reference

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
#: By length, layout and rule, a tuple for each sample: a :class:`Note`, or score, exact score and share of pages read.
Figures = dict[tuple[int, Layout, Rule], list[tuple[float, ...]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What is measured together, at one length and page size.

    Attributes
    ----------
    kind : {"coverage", "ruler", "routed"}
        Coverage, scores, or scores where the tokens of the question are routed too, one at a time, instead of being
        read in one call that looks at everything.
    rules : dict
        By placement.
    samples, first : int
        Samples per task, and those before them that are left out, since another part has them.
    label : str
        Tells parts apart that differ in their rules alone.
    """

    kind: str
    length: int
    page_size: int
    rules: dict[str, list[Rule]]
    samples: int
    first: int = 0
    label: str = "shares"

    @property
    def name(self) -> str:
        """A name for a file."""
        return f"{self.kind}-{self.label}-{self.length}-{self.page_size}-{self.first}"


def _rules(names: Iterable[str], shares: Iterable[float] = SHARES) -> list[Rule]:
    return [Rule(name, share) for name in names for share in shares]


def _key_cells(kind: str, length: int, page_size: int, samples: int, first: int = 0) -> Part:
    rules = _rules(("page_bound", "adaptive"), SHARES[1:3])
    return Part(kind, length, page_size, {"expert": rules, "sequential": rules}, samples, first)


def plan(samples: int, coverage_samples: int) -> list[Part]:
    """Return what is measured: RULER with `samples` per task, the cells that matter with four times as many."""
    others = _rules(("random", "oracle"), SHARES[1:3])
    others += [Rule("adaptive_without_floor", 1.0, target) for target in TARGETS[1:3]]
    # The pages of "hash" are those of "sequential": only what looks at shards differs there.
    rules = {
        "expert": _rules(("page_bound", "adaptive")) + _rules(("expert_topk", "hierarchical"), SHARES[:3]) + others,
        "sequential": _rules(("page_bound", "adaptive")) + _rules(("expert_topk",), SHARES[:3]) + others,
        "hash": _rules(("expert_topk", "hierarchical"), SHARES[1:3]),
    }
    mass = _rules(("page_mass",), SHARES[1:3])
    parts = [
        Part("coverage", length, page_size, {name: coverage_rules(name) for name in PLACEMENTS}, coverage_samples)
        for length in LENGTHS
        for page_size in PAGE_SIZES
    ]
    for length in LENGTHS:
        for kind, number, some in (("coverage", coverage_samples, TARGETS), ("ruler", samples, TARGETS[1:])):
            targets = [Rule("adaptive", 1.0, target) for target in some]
            parts.append(Part(kind, length, 8, {"expert": targets, "sequential": targets}, number, label="targets"))
    return [
        *parts,
        Part("ruler", 2048, 8, rules, samples),
        _key_cells("ruler", 2048, 8, 3 * samples, samples),
        _key_cells("routed", 2048, 8, samples),
        _key_cells("ruler", 2048, 16, samples),
        Part("ruler", 1024, 8, rules, samples),
        _key_cells("ruler", 1024, 16, samples),
        *(Part("ruler", 2048, size, {"sequential": mass}, samples, label="mass") for size in PAGE_SIZES),
    ]


def coverage_rules(placement: str) -> list[Rule]:
    """Return the rules whose coverage is measured."""
    if placement == "hash":
        return _rules(("expert_topk", "hierarchical"))
    rules = _rules(("page_bound", "adaptive", "expert_topk", "random", "oracle"))
    rules += _rules(("hierarchical",)) if placement == "expert" else []
    names = ("page_bound", "adaptive", "oracle")
    return rules + [Rule(name, share, of_full=True) for name in names for share in SHARES[1:]]


def interval(figures: Sequence[float]) -> float:
    """Return half the width of the 95% interval of a mean."""
    return 1.96 * statistics.stdev(figures) / len(figures) ** 0.5 if len(figures) > 1 else 0.0


def _cell(length: int, layout: Layout, rule: Rule) -> Row:
    row: Row = {"tokens": length, "page_size": layout.page_size, "placement": layout.placement, "policy": rule.name}
    if rule.coverage < 1:
        return {**row, "target": rule.coverage}
    return {**row, "share_of_full" if rule.of_full else "share": rule.share}


def measure(reader: Reader, part: Part, seed: int) -> Figures:
    """Measure a part."""
    found: Figures = {}
    every = part.first + part.samples
    for index, sample in enumerate(reference.generate(part.length, every, seed=seed)):
        if index % every < part.first:
            continue
        for placement, rules in part.rules.items():
            layout = Layout(placement, part.page_size)
            figures: dict[Rule, Any]
            if part.kind == "coverage":
                figures = reader.coverage(sample, layout, rules)
            else:
                exact, scores = reader.scores(sample, layout, rules, one_by_one=part.kind == "routed")
                figures = {rule: (score, exact, read) for rule, (score, read) in scores.items()}
            for rule, figure in figures.items():
                found.setdefault((part.length, layout, rule), []).append(figure)
    return found


def save_part(file: Path, found: Figures) -> None:
    """Keep what was measured of each sample."""
    rows = [
        {"tokens": length, "layout": dataclasses.asdict(layout), "rule": dataclasses.asdict(rule), "figures": figures}
        for (length, layout, rule), figures in found.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


def load_part(file: Path) -> Figures:
    """Return what :func:`save_part` kept."""
    rows = json.loads(file.read_text())
    return {
        (row["tokens"], Layout(**row["layout"]), Rule(**row["rule"])): [tuple(each) for each in row["figures"]]
        for row in rows
    }


def coverage_row(key: tuple[int, Layout, Rule], notes: Sequence[tuple[float, ...]]) -> Row:
    """Summarise one rule."""
    row = _cell(*key)
    for name, figures in zip(Note._fields, zip(*notes, strict=True), strict=True):
        row |= {name: statistics.fmean(figures), f"{name}_ci": interval(figures)}
    return row


def ruler_row(key: tuple[int, Layout, Rule], triples: Sequence[tuple[float, ...]], kind: str) -> Row:
    """Summarise one rule."""
    scores, exact, read = zip(*triples, strict=True)
    differences = [score - full for score, full in zip(scores, exact, strict=True)]
    return {
        **_cell(*key),
        "question": "routed" if kind == "routed" else "read in one call",
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
        for place, name in enumerate(Note._fields):
            added = [a[place] - b[place] for a, b in zip(notes, other, strict=True)]
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
    """What has been measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._found: dict[str, Figures] = {"coverage": {}, "ruler": {}, "routed": {}}

    def add(self, kind: str, found: Figures) -> None:
        """Take what a part has found."""
        for key, figures in found.items():
            self._found[kind].setdefault(key, []).extend(figures)

    def tables(self) -> dict[str, list[Row]]:
        """Return all rows."""
        return {
            "coverage": [coverage_row(*item) for item in self._found["coverage"].items()],
            "ruler": [ruler_row(*item, kind) for kind in ("ruler", "routed") for item in self._found[kind].items()],
            "expert_minus_sequential": placement_rows(self._found["coverage"], self._found["ruler"]),
        }

    def save(self, file: Path) -> None:
        """Write all rows."""
        about = {
            "metric": METRIC,
            "recent_window": WINDOW,
            "sink_tokens": SINKS,
            "placements": PLACEMENTS,
            "dtype": "float32",
            "coverage_samples_per_task": self._arguments.coverage_samples,
            "tasks": list(reference.TASKS),
            "seed": self._arguments.seed,
        }
        write_rows(file, about, self.tables())


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
            f"{100 * r['target']:g}% target" if "target" in r else f"{100 * r['share']:g}%",
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
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.routing.routing_study", description=__doc__)
    parser.add_argument("--output", type=Path, help="file for the results, such as eval/results/routing.json")
    parser.add_argument("--coverage-samples", type=int, default=4, help="samples per task and length for coverage")
    parser.add_argument("--samples", type=int, default=10, help="samples per task for RULER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--parts", type=Path, help="folder to keep parts in; those already there are not measured anew")
    parser.add_argument("--only", nargs="*", help="parts to measure, by name; those kept are taken in any case")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, reader, study = Console(highlight=False), Reader(), Study(arguments)
    for part in plan(arguments.samples, arguments.coverage_samples):
        file = None if arguments.parts is None else arguments.parts / f"{part.name}.json"
        if file is not None and file.exists():
            found = load_part(file)
        elif arguments.only is None or part.name in arguments.only:
            with console.status(f"measuring {part.name}"):
                found = measure(reader, part, arguments.seed)
            if file is not None:
                save_part(file, found)
        else:
            continue
        study.add(part.kind, found)
        if arguments.output is not None:
            study.save(arguments.output)
    _show(console, study.tables())
    if arguments.output is not None:
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
