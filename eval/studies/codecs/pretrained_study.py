"""What codecs cost a pretrained model: perplexity on prose and code, RULER scores; `eval/results/codecs-smollm2.json`.

Whatever is measured is kept in a folder of parts: what was stopped goes on where it was, and a new codec is measured
beside those that are known.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.protocol import Asker

from ...report.result_rows import show_table, write_rows
from . import pretrained_perplexity as perplexity
from . import pretrained_ruler as ruler
from .real_text import texts

Row = dict[str, Any]
Parts = Sequence[perplexity.Part]


def measure_perplexity(model: Any, tokenizer: Any, folder: Path, parts: Parts, console: Console) -> list[Row]:
    """Return a row for each text, length and codec."""
    rows: list[Row] = []
    for part in parts:
        for read in texts():
            file, found = folder / f"{part.name}-{read.name}.jsonl", list[Row]()
            for row in perplexity.measure(model, tokenizer, part, read, file):
                found.append(row)
                console.print(
                    f"{part.name} {read.name}: {len(found)} of {part.windows * len(part.codecs)}", soft_wrap=True
                )
            rows += perplexity.rows_of(part, read, found)
    return rows


def measure_ruler(asker: Asker, folder: Path, console: Console) -> list[Row]:
    """Return a row for each length and codec."""
    rows: list[Row] = []
    for part in ruler.PARTS:
        found: list[Row] = []
        for row in ruler.measure(asker, part, folder / f"{part.name}.jsonl"):
            found.append(row)
            console.print(f"{part.name}: {row['task']}, {row['codec']}: {sum(row['scores']) / len(row['scores']):.1f}")
        rows += ruler.rows_of(part, found)
    return rows


def show(console: Console, tables: dict[str, list[Row]]) -> None:
    """Print the rows."""
    lines = [
        [
            f"{row['text']} / {row['tokens']:,} / {row['codec']}",
            "-" if row["share"] is None else f"{row['share']:.3f}",
            f"{100 * row['change']:+.3f}",
            " to ".join(f"{100 * end:+.3f}" for end in row["change_ci"]),
            f"{row['divergence']:.5f}",
        ]
        for row in tables.get("perplexity", [])
    ]
    show_table(console, "Perplexity", ["text / tokens / codec", "share", "change (%)", "95%", "divergence"], lines)
    lines = [
        [
            f"{row['tokens']:,} / {row['codec']}",
            str(row["samples"]),
            f"{row['score']:.1f}",
            f"{row['difference']:+.1f} ± {row['difference_ci']:.1f}",
            f"{100 * row['agreement']:.0f}",
        ]
        for row in tables.get("ruler", [])
    ]
    show_table(console, "RULER", ["tokens / codec", "samples", "score", "- none", "same answer (%)"], lines)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its tables and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.pretrained_study", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder or a name, as of pikv eval")
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep what is measured in")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--only", nargs="*", choices=("perplexity", "ruler"), default=("perplexity", "ruler"))
    parser.add_argument("--lengths", nargs="*", type=int, help="of perplexity: all by default")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    model, tokenizer = load_model(arguments.model, "float32")
    tables: dict[str, list[Row]] = {}
    if "perplexity" in arguments.only:
        parts = [part for part in perplexity.PARTS if part.tokens in (arguments.lengths or (part.tokens,))]
        tables["perplexity"] = measure_perplexity(model, tokenizer, arguments.parts, parts, console)
    if "ruler" in arguments.only:
        tables["ruler"] = measure_ruler(Asker(model, tokenizer), arguments.parts, console)
    show(console, tables)
    if arguments.output is not None:
        about = {
            "model": arguments.model,
            "dtype": "float32",
            "texts": {read.name: {"source": read.source, "sha256": read.digest} for read in texts()},
            "perplexity_metric": perplexity.METRIC,
            "ruler_metric": ruler.METRIC,
            "ruler_tasks": list(ruler.TASKS),
            "ruler_seed": ruler.SEED,
        }
        write_rows(arguments.output, about, tables)


if __name__ == "__main__":
    main()
