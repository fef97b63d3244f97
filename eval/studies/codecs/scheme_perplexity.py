"""Schemes of quantisation judged by a pretrained model's predictions: what the error of attention comes to in the end.

Keys or values of all pages of a prompt are put through a scheme, as `quantisation_schemes` has it, and the text goes on
behind them, whose own pages stay exact: `eval/results/scheme-perplexity-smollm2.json`.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.runner.models import load_model

from ...report.result_rows import show_table, write_rows
from .pretrained_perplexity import METRIC, Part, WindowReader, measure_windows, rows_of
from .quantisation_schemes import KEY_SCHEMES, VALUE_SCHEMES
from .quantisation_schemes_study import page_sizes
from .real_text import Text, texts

PART = Part(2048, 2, 256)
#: Those that came near the shipped ones by the error of attention, and their bits.
OF_KEYS = ("shipped", "Hadamard, per channel", "Hadamard, per token")
OF_VALUES = ("shipped", "per token", "Hadamard, per token")
BITS = (4, 2)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Schemes of keys and of values by name with their bits, None for exact ones."""

    keys: tuple[str, int] | None = None
    values: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """For files and tables."""
        parts = (("keys", self.keys), ("values", self.values))
        return " | ".join(f"{part}: {chosen[0]}, {chosen[1]} bits" for part, chosen in parts if chosen)

    @property
    def share(self) -> float:
        """Bytes over those of bf16 at head dim 128, of the parts that are coded, their parameters included."""
        sizes = {(row["part"], row["scheme"], row["bits"]): row["share"] for row in page_sizes()}
        chosen = [sizes["keys", *self.keys]] if self.keys else []
        chosen += [sizes["values", *self.values]] if self.values else []
        return sum(chosen) / len(chosen)


def choices() -> list[Choice]:
    """Return what is compared: keys alone, values alone, and the shipped keys with other values."""
    found = [Choice(keys=(name, bits)) for bits, name in itertools.product(BITS, OF_KEYS)]
    found += [Choice(values=(name, bits)) for bits, name in itertools.product(BITS, OF_VALUES)]
    for of_keys, of_values in ((4, 4), (4, 2), (2, 2)):
        found += [Choice(("shipped", of_keys), (name, of_values)) for name in ("shipped", "Hadamard, per token")]
    return found


def measure(model: Any, tokenizer: Any, part: Part, read: Text, file: Path) -> Iterator[Row]:
    """Yield what each choice makes of each window of a text; what the file has is not measured anew."""
    ways = {choice.name: choice for choice in choices()}
    return measure_windows(model, tokenizer, part, read, file, ways, lambda reader: partial(measured, reader))


def measured(reader: WindowReader, choice: Choice) -> Row:
    """Return the likelihoods of a window behind keys and values that were put through schemes."""

    def changed(tokens: torch.Tensor, scheme: Any, chosen: tuple[str, int] | None) -> torch.Tensor:
        return tokens if chosen is None else reader.with_coded(tokens, lambda pages: scheme(pages, chosen[1]))

    of_keys = KEY_SCHEMES[choice.keys[0]] if choice.keys else None
    of_values = VALUE_SCHEMES[choice.values[0]] if choice.values else None
    layers = [
        (query, changed(keys, of_keys, choice.keys), changed(values, of_values, choice.values))
        for query, keys, values in reader.prompt.layers
    ]
    return reader.read_behind(layers)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m pikv_hf.eval.studies.codecs.scheme_perplexity", description=__doc__
    )
    parser.add_argument("--model", default="smollm2", help="a folder or a name, as of pikv eval")
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep what is measured in")
    parser.add_argument("--output", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    model, tokenizer = load_model(arguments.model, "float32")
    shares = {choice.name: choice.share for choice in choices()}
    rows: list[Row] = []
    for read in texts():
        found: list[Row] = []
        for row in measure(model, tokenizer, PART, read, arguments.parts / f"schemes-{read.name}.jsonl"):
            found.append(row)
            console.print(f"{read.name}: {len(found)} of {PART.windows * len(shares)}")
        for row in rows_of(PART, read, found):
            name = row.pop("codec")
            rows.append({**row, "scheme": name, "share": shares[name]})
    cells = [
        [
            f"{row['text']} / {row['scheme']}",
            f"{row['share']:.3f}",
            f"{100 * row['change']:+.2f}",
            f"{row['divergence']:.5f}",
        ]
        for row in rows
    ]
    show_table(console, "Schemes", ["text / scheme", "bytes (D = 128)", "change (%)", "divergence"], cells)
    if arguments.output is not None:
        write_rows(arguments.output, {"model": arguments.model, "metric": METRIC}, {"results": rows})


if __name__ == "__main__":
    main()
