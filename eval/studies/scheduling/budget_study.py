"""What budgets keep: needles after a long generation, and RULER after prefill in chunks.

Generation: a prompt with needles is read in one call; text that also has needles is then "generated" token by token,
as given; then each needle is asked for. Prefill: RULER contexts are read in chunks under a budget; the bytes that this
takes at most are measured by `pikv bench chunks`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.config import JOINT, SCHEDULERS
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.studies.scheduling.budget_runs import (
    GENERATED,
    NEEDLES,
    OPTIONS,
    PROMPT,
    RANDOM,
    Finding,
    Generator,
    ruler_samples,
)
from pikv_hf.eval.studies.scheduling.decoding_ways import OPTIONS as PRESS_OPTIONS
from pikv_hf.eval.studies.scheduling.decoding_ways import WAYS
from pikv_hf.eval.tasks import reference

Row = dict[str, Any]

SHARES = (0.125, 0.25, 0.5)
#: Where tokens go: to the shards of their experts, or page by page in order of time.
PLACEMENTS: dict[str, dict[str, Any]] = {"expert": {}, "sequential": {"placement": "hash", "num_shards": 1}}
#: What is also measured with pages in order of time, at one share.
SEQUENTIAL = ("pikv", "h2o", "quest", "streaming_llm", RANDOM)
#: What is active while text is generated, of :data:`WAYS`.
PRESSES = tuple(name for name in WAYS if "Press" in name)
LENGTH, CHUNK, PREFILL_SHARE = 2048, 128, 0.25
METRIC = (
    "generation: share of needles whose number is answered exactly, in percent, those of the prompt and those of the "
    "generated text; the budget is a share of the tokens of both, in tokens per sequence and layer; held: the most "
    "tokens that a sequence held in a layer after any step, mean over KV heads; of 'joint' mean over layers too, "
    "packed tokens counted as what they take of others; of presses the bytes of all rows and layers, as tokens. "
    "Intervals are 95%, normal, over "
    "documents. ruler: RULER's score in percent, mean over tasks, contexts read in chunks under a budget that is a "
    "share of the tokens seen; differences from full are paired by sample, intervals over samples"
)


def interval(figures: Sequence[float]) -> float:
    """Return half the width of the 95% interval of a mean."""
    return 1.96 * statistics.stdev(figures) / len(figures) ** 0.5 if len(figures) > 1 else 0.0


class Study:
    """Measures part after part and keeps what was measured.

    Parameters
    ----------
    arguments : argparse.Namespace
        Documents, samples, seed, and the folder to keep parts in.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.generator = Generator(getattr(torch, arguments.dtype))
        self.documents = self.generator.documents(arguments.documents, arguments.seed)
        self.samples = ruler_samples(LENGTH, arguments.samples, arguments.seed) if arguments.samples else []

    def parts(self) -> dict[str, Callable[[], Row]]:
        """Return what is measured, by name."""
        parts: dict[str, Callable[[], Row]] = {"generation full": partial(self.generation, None, 1.0, "expert")}
        for share in SHARES:
            for name in (*SCHEDULERS, JOINT, RANDOM):
                parts[f"generation {name} {share}"] = partial(self.generation, name, share, "expert")
        for share in SHARES:
            for name in PRESSES:
                parts[f"pressed {name} {share}"] = partial(self.generation_by_press, name, share)
        for name in SEQUENTIAL:
            parts[f"generation {name} sequential"] = partial(self.generation, name, 0.25, "sequential")
        if self.samples:
            parts["ruler full"] = partial(self.ruler, None)
            for name in (*SCHEDULERS, JOINT, RANDOM):
                parts[f"ruler {name}"] = partial(self.ruler, name)
        return parts

    def generation(self, scheduler: str | None, share: float, placement: str) -> Row:
        """Ask for needles after a long generation."""
        budget = int(share * (PROMPT + GENERATED))
        found, held = self.generator.find(self.documents, scheduler, budget, PLACEMENTS[placement])
        return self._needles({"scheduler": scheduler or "full", "placement": placement}, share, budget, found, held)

    def generation_by_press(self, name: str, share: float) -> Row:
        """Ask for needles after a long generation in which a press was active."""
        budget = int(share * (PROMPT + GENERATED))
        found, held = self.generator.find_by_press(self.documents, WAYS[name], budget)
        return self._needles({"scheduler": name, "placement": "sequential"}, share, budget, found, held)

    def _needles(self, about: Row, share: float, budget: int, found: Sequence[Finding], held: float) -> Row:
        row: Row = {
            **about,
            "share": share,
            "budget": budget,
            "held": held,
            "documents": len(found),
            "needles": 2 * NEEDLES * len(found),
        }
        for name, figures in zip(found[0]._fields, zip(*found, strict=True), strict=True):
            row |= {name: 100 * statistics.fmean(figures), f"{name}_ci": 100 * interval(figures)}
        both = [statistics.fmean(finding) for finding in found]
        return {**row, "both": 100 * statistics.fmean(both), "both_ci": 100 * interval(both)}

    def ruler(self, scheduler: str | None) -> Row:
        """Answer RULER's questions after contexts were read in chunks."""
        scores = [self.generator.ruler(sample, scheduler, PREFILL_SHARE, CHUNK) for sample in self.samples]
        return {"scheduler": scheduler or "full", "samples": len(scores), "scores": scores}

    def measure(self, name: str, part: Callable[[], Row]) -> Row:
        """Measure a part, or take it from where it was kept; without a folder for parts nothing is kept."""
        given = self.arguments
        setting = f"{given.documents}-{given.samples}-{given.seed}-{given.dtype}"
        file = None if given.parts is None else given.parts / f"{name.replace(' ', '-')}-{setting}.json"
        if file is not None and file.exists():
            row: Row = json.loads(file.read_text())
            return row
        started = time.perf_counter()
        row = {**part(), "seconds": time.perf_counter() - started}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row))
        return row


def ruler_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows of scores as means, with differences from the row of the full cache."""
    full: list[float] = next((row["scores"] for row in rows if row["scheduler"] == "full"), [])
    found = []
    for row in rows:
        scores = row["scores"]
        differences = [score - exact for score, exact in zip(scores, full, strict=True)]
        found.append(
            {
                "scheduler": row["scheduler"],
                "samples": len(scores),
                "score": statistics.fmean(scores),
                "score_ci": interval(scores),
                "difference": statistics.fmean(differences),
                "difference_ci": interval(differences),
                "seconds": row["seconds"],
            }
        )
    return found


def tables_of(measured: dict[str, Row]) -> dict[str, list[Row]]:
    """Return the rows of all parts, by kind."""
    kinds = {"generation": ("generation", "pressed"), "ruler": ("ruler",)}
    of_kind = {kind: [row for name, row in measured.items() if name.startswith(of)] for kind, of in kinds.items()}
    return {**of_kind, "ruler": ruler_rows(of_kind["ruler"])}


def _show(console: Console, tables: dict[str, list[Row]]) -> None:
    rows = [
        [
            f"{row['scheduler']}, {row['placement']}",
            f"{100 * row['share']:g}%",
            f"{row['held']:.0f} of {row['budget']}",
            *(f"{row[name]:.1f} ± {row[name + '_ci']:.1f}" for name in ("in_prompt", "generated", "both")),
        ]
        for row in tables["generation"]
    ]
    columns = ["scheduler, placement", "budget", "tokens held", "of the prompt", "generated", "both"]
    show_table(console, "Needles found after a long generation (%)", columns, rows)
    rows = [
        [row["scheduler"], str(row["samples"]), f"{row['score']:.1f}", _signed(row["difference"], row["difference_ci"])]
        for row in tables["ruler"]
    ]
    title = f"RULER at {LENGTH:,} tokens read in chunks of {CHUNK} under {100 * PREFILL_SHARE:g}%"
    show_table(console, title, ["scheduler", "samples", "score", "- full"], rows)


def _signed(mean: float, half: float) -> str:
    return f"{mean:+.1f} ± {half:.1f}"


def _save(file: Path, arguments: argparse.Namespace, tables: dict[str, list[Row]]) -> None:
    about = {
        "metric": METRIC,
        "seed": arguments.seed,
        "options": OPTIONS,
        "options_of_presses": PRESS_OPTIONS,
        "generation_tokens": [PROMPT, GENERATED],
        "needles_per_document": 2 * NEEDLES,
        "ruler_length": LENGTH,
        "ruler_chunk": CHUNK,
        "ruler_tasks": list(reference.TASKS),
        "dtype": arguments.dtype,
    }
    write_rows(file, about, tables)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its tables and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.scheduling.budget_study", description=__doc__)
    parser.add_argument("--output", type=Path, help="file for the results, such as eval/results/budgets.json")
    parser.add_argument("--documents", type=int, default=16, help="documents of the generation part")
    parser.add_argument("--samples", type=int, default=3, help="RULER samples per task; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--parts", type=Path, help="folder to keep parts in; those already there are not measured anew")
    parser.add_argument("--only", nargs="*", help="measure only parts whose name begins so, such as ruler")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, study, measured = Console(highlight=False), Study(arguments), dict[str, Row]()
    for name, part in study.parts().items():
        if arguments.only is not None and not any(name.startswith(each) for each in arguments.only):
            continue
        with console.status(f"measuring {name}"):
            measured[name] = study.measure(name, part)
        if arguments.output is not None:
            _save(arguments.output, arguments, tables_of(measured))
    _show(console, tables_of(measured))
    if arguments.output is not None:
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
