"""How well plans predict: bytes of real caches, and times of a step as `pikv bench decode` takes them, in the same run.

    python -m pikv_hf.eval.studies.planning.plan_validation --output eval/results/plan-validation.json

The device that times are predicted for is measured by `pikv_hf.planning.calibration`, anew before every measurement, on
tensors of its own; nothing is fitted to the times that are compared.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf import PiKVConfig
from pikv_hf.planning.cache_contents import CacheContents
from pikv_hf.planning.calibration import calibrated_cpu
from pikv_hf.planning.hardware import Device
from pikv_hf.planning.model_shape import ModelShape, shape_of
from pikv_hf.planning.step_time import layer_seconds

from ...bench.bench_table import WIDTH
from ...bench.decode import geometry_model, run_decode
from ...provenance import provenance
from .plan_validation_memory import MemoryCell, PartCell, memory_cells, part_cells

#: Of times: codec, routing.
KINDS = (("none", "all"), ("int8", "all"), ("int4", "all"), ("none", "page_bound"))

#: What predictions are to keep to.
MEMORY_BOUND, TIME_BOUND = 0.02, 1.5


@dataclasses.dataclass(frozen=True, slots=True)
class TimeCell:
    """One size: predicted and measured seconds of a layer's step, medians over rounds, and of each round."""

    codec: str
    routing: str
    tokens: int
    batch: int
    predicted: float
    measured: float
    ratio: float
    rounds: tuple[tuple[float, float], ...]


# Time


def time_cells(
    contexts: Sequence[int], batches: Sequence[int], rounds: int, seconds: float, max_pages: int
) -> Iterator[tuple[TimeCell, Device]]:
    """Predict and measure the time of a layer's step; yield each cell with the last measured device."""
    shape = shape_of(geometry_model().config, "the benchmark's layer", dtype="float32")
    for tokens in contexts:
        for batch in batches:
            pairs: dict[tuple[str, str], list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for _ in range(rounds):
                for kind in KINDS:
                    # Just before what it predicts: other programs may share the machine.
                    device = calibrated_cpu()
                    predicted = _predicted(shape, tokens, batch, *kind, max_pages, device)
                    case = next(run_decode([tokens], [batch], seconds, [kind[0]], kind[1], max_pages))
                    pairs[kind].append((predicted, case.pikv.p50))
            for (codec, routing), found in pairs.items():
                predicted, measured = (statistics.median(each) for each in zip(*found, strict=True))
                name = routing if routing == "all" else f"{routing}:{max_pages}"
                cell = TimeCell(codec, name, tokens, batch, predicted, measured, predicted / measured, tuple(found))
                yield cell, device


def _predicted(
    shape: ModelShape, tokens: int, batch: int, codec: str, routing: str, max_pages: int, device: Device
) -> float:
    options = PiKVConfig(key_codec=codec, value_codec=codec, routing=routing, max_pages=max_pages)
    return layer_seconds(shape.layers[0], CacheContents(tokens, batch, options), shape.dtype, device)


# Running it


def summary(memory: Sequence[MemoryCell], parts: Sequence[PartCell], times: Sequence[TimeCell]) -> dict[str, Any]:
    """Return how many cells keep to the bounds, and the worst."""
    factors = [max(cell.ratio, 1 / cell.ratio) for cell in times]
    return {
        "memory": _errors([abs(cell.error) for cell in memory]),
        "parts": _errors([abs(cell.error) for cell in parts]),
        "time": {
            "bound": TIME_BOUND,
            "cells": len(factors),
            "within": sum(factor <= TIME_BOUND for factor in factors),
            "median": statistics.median(factors) if factors else None,
            "worst": max(factors, default=None),
            "beyond": [
                f"{c.codec}, {c.routing}, {c.tokens} x {c.batch}: {c.ratio:.2f}"
                for c, factor in zip(times, factors, strict=True)
                if factor > TIME_BOUND
            ],
        },
    }


def _errors(errors: Sequence[float]) -> dict[str, Any]:
    return {
        "bound": MEMORY_BOUND,
        "cells": len(errors),
        "within": sum(error <= MEMORY_BOUND for error in errors),
        "mean": statistics.fmean(errors) if errors else None,
        "worst": max(errors, default=None),
    }


def tables(result: dict[str, Any]) -> str:
    """Return the tables of `docs/planning.md` from a file of results: Markdown."""
    return "\n\n".join([_memory_table(result["memory"]), _part_table(result["parts"]), _time_table(result["times"])])


def _memory_table(cells: Sequence[dict[str, Any]]) -> str:
    codecs = list(dict.fromkeys(cell["codec"] for cell in cells))
    rows = [["error of predicted bytes, mean and worst", *codecs]]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        by_codec = {
            codec: [c["error"] for c in cells if (c["model"], c["codec"]) == (model, codec)] for codec in codecs
        }
        rows.append([model, *(_range_text(errors) for errors in by_codec.values())])
    return _markdown(rows)


def _part_table(cells: Sequence[dict[str, Any]]) -> str:
    rows = [["tokens x rows, parts", "model, codec", "error", "fullest above the mean"]]
    for cell in cells:
        size = f"{cell['tokens']:,} x {cell['batch']}, {cell['parts']}"
        rows.append([size, f"{cell['model']}, {cell['codec']}", f"{cell['error']:+.1%}", f"{cell['fullest']:+.1%}"])
    return _markdown(rows)


def _time_table(cells: Sequence[dict[str, Any]]) -> str:
    sizes = list(dict.fromkeys((cell["tokens"], cell["batch"]) for cell in cells))
    rows = [["predicted / measured, ms", *(f"{tokens:,} x {batch}" for tokens, batch in sizes)]]
    for kind in dict.fromkeys((cell["codec"], cell["routing"]) for cell in cells):
        found = {(c["tokens"], c["batch"]): c for c in cells if (c["codec"], c["routing"]) == kind}
        rows.append([", ".join(kind), *(_time_text(found[size]) if size in found else "-" for size in sizes)])
    return _markdown(rows)


def _range_text(errors: Sequence[float]) -> str:
    return f"{statistics.fmean(map(abs, errors)):.1%}, {max(errors, key=abs):+.1%}" if errors else "-"


def _time_text(cell: dict[str, Any]) -> str:
    return f"{cell['predicted'] * 1e3:.1f} / {cell['measured'] * 1e3:.1f} = {cell['ratio']:.2f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(argv: list[str] | None = None) -> None:
    """Run both comparisons, print their tables and write their cells."""
    parser = argparse.ArgumentParser(
        prog="python -m pikv_hf.eval.studies.planning.plan_validation", description=__doc__
    )
    parser.add_argument("--output", type=Path, help="file for the results, eval/results/plan-validation.json")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="times that each step is predicted and measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each measurement, at least")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[4096, 32768, 131072], help="contexts of the times; may be none"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4], help="rows of the times")
    parser.add_argument("--max-pages", type=int, default=64, help="that routing reads")
    parser.add_argument("--no-memory", action="store_true", help="compare times alone")
    parser.add_argument("--show", type=Path, help="only print the tables of such a file, as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.show is not None:
        print(tables(json.loads(arguments.show.read_text())))
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(highlight=False, width=WIDTH, log_path=False)
    memory: list[MemoryCell] = []
    for stored in () if arguments.no_memory else memory_cells():
        sizes = f"{stored.tokens:,} x {stored.batch}, {stored.generated} decoded"
        console.log(f"{stored.model}, {stored.codec}, {sizes}: {stored.error:+.2%}")
        memory.append(stored)
    parts = [] if arguments.no_memory else list(part_cells())
    times: list[TimeCell] = []
    device: Device | None = None
    for cell, measured_device in time_cells(
        arguments.tokens, arguments.batch, arguments.rounds, arguments.seconds, arguments.max_pages
    ):
        console.log(f"{cell.codec}, {cell.routing}, {cell.tokens:,} x {cell.batch}: {cell.ratio:.2f}")
        times.append(cell)
        device = measured_device
    result = {
        **provenance(),
        "summary": summary(memory, parts, times),
        "calibrated": None if device is None else device.to_dict(),
        "memory": [dataclasses.asdict(cell) for cell in memory],
        "parts": [dataclasses.asdict(cell) for cell in parts],
        "times": [dataclasses.asdict(cell) for cell in times],
    }
    print(tables(result))
    console.print(result["summary"])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
