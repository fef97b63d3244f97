"""The original's variants (A) to (G) by its own protocol: latency, bytes, hit rate, load imbalance and synergy.

The original (arXiv 2508.06526) names the variants in `downstream_tasks/README.md` of its repository and how to measure
in `downstream_tasks/EXPERIMENTAL_PROTOCOL.md`: a context of 4,096 tokens, requests with prompts of 512 tokens that
write 128, eight of them at once, three runs and their range. Here they are measured on a pretrained model that was
upcycled to a mixture of experts, and on real text; each run has a text of its own. Every run is kept as soon as it is
measured; what was stopped goes on there.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.quiet import quiet_transformers
from pikv_hf.eval.studies.codecs.real_text import texts
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.variants.attention_hits import exact_attention, hit_rate
from pikv_hf.eval.studies.variants.request_runs import Variant, Work, serve

Row = dict[str, Any]

CONTEXT, PROMPT, NEW, REQUESTS, RUNS = 4096, 512, 128, 8, 3
#: Steps of which hits are counted.
STEPS = 16
SHARDS = 4
#: Of what the original takes off: half.
RATIO = 0.5
_HASH: dict[str, Any] = {"placement": "hash", "num_shards": SHARDS}
_EXPERT, _BALANCED = _HASH | {"placement": "expert"}, _HASH | {"placement": "balanced"}
#: The press or option that comes closest to each of the original's modules, and every module alone.
VARIANTS = (
    Variant("(G) DynamicCache"),
    Variant("PiKVCache, exact", options=_HASH),
    Variant("expert placement", options=_EXPERT),
    Variant("balanced placement", options=_BALANCED),
    Variant("PyramidPress", options=_HASH, press="PyramidPress", ratio=RATIO),
    Variant("ChunkKVPress(SnapKVPress)", options=_HASH, press="ChunkKVPress(SnapKVPress)", ratio=RATIO),
    Variant(
        "(A) balanced placement, DuoPress",
        parts=("balanced placement", "(F) DuoPress"),
        options=_BALANCED,
        press="DuoPress",
        ratio=RATIO,
    ),
    Variant(
        "(B) expert placement, PyramidPress(headwise=True)",
        parts=("expert placement", "PyramidPress"),
        options=_EXPERT,
        press="PyramidPress(headwise=True)",
        ratio=RATIO,
    ),
    Variant("(C) LoRAPress", options=_HASH, press="LoRAPress", ratio=RATIO),
    Variant("(D) routing, page_mass, 25% of the pages", options=_HASH | {"routing": "page_mass", "max_pages": 0.25}),
    Variant(
        "(E) LoRAPress, ChunkKVPress(SnapKVPress)",
        parts=("(C) LoRAPress", "ChunkKVPress(SnapKVPress)"),
        options=_HASH,
        # Each does as much as it does alone.
        press=f"ComposedPress([LoRAPress({RATIO}), ChunkKVPress(SnapKVPress({RATIO}))])",
        ratio=None,
    ),
    Variant("(F) DuoPress", options=_HASH, press="DuoPress", ratio=RATIO),
    Variant("PiKVPress, 25%", options=_HASH, press="PiKVPress", ratio=0.75),
    Variant(
        "PiKVPress, balanced placement, page_mass",
        parts=("PiKVPress, 25%", "balanced placement", "(D) routing, page_mass, 25% of the pages"),
        options=_BALANCED | {"routing": "page_mass", "max_pages": 0.25},
        press="PiKVPress",
        ratio=0.75,
    ),
)
#: What every variant is built on: synergy is counted from here.
BASE = "PiKVCache, exact"
METRIC = (
    f"latency: seconds that a request takes (to copy or fork the context's cache, to read {PROMPT} tokens of prompt "
    f"and to write {NEW} as given; {REQUESTS} requests at once, a token of each in turn), mean and range over runs; "
    f"context_seconds: to read the context of {CONTEXT} tokens once and compress it; context_bytes: live bytes then; "
    "kv_bytes: those of all requests at the end, what they share counted once; compression: those of DynamicCache over "
    "these; hit_rate: share of the exact model's attention that falls on what a step reads, mean over "
    f"{STEPS} steps of one request, layers and heads, missing where a press renumbers tokens; imbalance: variance over "
    "mean of the tokens of shards after the context, which grows with the tokens that are left; fullest: most over "
    "mean; nats: mean negative log likelihood of what is written; synergy: change of a figure against "
    f"'{BASE}', less the sum of the changes that its parts make alone: of bytes it is positive for two that both save, "
    "since the second finds fewer. One warm-up of 512 tokens before each run, where the original has three iterations"
)


def rows_of(parts: Mapping[str, Sequence[Row]], hits: Mapping[str, float | None]) -> list[Row]:
    """Return a row for each variant, of its runs."""
    rows: dict[str, Row] = {}
    for variant in VARIANTS:
        runs = parts.get(variant.name, [])
        if not runs:
            continue
        latencies = [run["latency"] for run in runs]
        row = {"variant": variant.name, "runs": len(runs), "latency": statistics.fmean(latencies)}
        row["latency_range"] = [round(seconds, 3) for seconds in (min(latencies), max(latencies))]
        row["hit_rate"] = hits.get(variant.name)
        for name in ("context_seconds", "context_bytes", "nats"):
            row[name] = statistics.fmean(run[name] for run in runs)
        row["kv_bytes"] = statistics.fmean(run["open_bytes"] for run in runs)
        for name in ("imbalance", "fullest"):
            found = [run[name] for run in runs if run[name] is not None]
            row[name] = statistics.fmean(found) if found else None
        rows[variant.name] = row
    for variant in VARIANTS:
        if variant.name in rows and (first := rows.get(VARIANTS[0].name)):
            rows[variant.name]["compression"] = first["kv_bytes"] / rows[variant.name]["kv_bytes"]
        if variant.parts and {variant.name, BASE, *variant.parts} <= rows.keys():
            rows[variant.name]["synergy"] = {
                name: round(synergy(rows, variant, name), 4) for name in ("latency", "kv_bytes", "nats")
            }
    return list(rows.values())


def synergy(rows: Mapping[str, Row], variant: Variant, figure: str) -> float:
    """Return by how much a figure changes beyond what the parts of a variant change alone."""
    base = float(rows[BASE][figure])
    alone = sum(rows[part][figure] - base for part in variant.parts)
    return float(rows[variant.name][figure]) - base - alone


def _show(console: Console, rows: Sequence[Row]) -> None:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = [
        [
            row["variant"],
            f"{row['latency']:.2f} ({row['latency_range'][0]:.2f}-{row['latency_range'][1]:.2f})",
            f"{row['context_seconds']:.1f}",
            f"{row['kv_bytes'] / 1e9:.3f}",
            cell(None if row["hit_rate"] is None else 100 * row["hit_rate"], ".1f"),
            cell(row["imbalance"], ".0f"),
            f"{row['nats']:.3f}",
            cell(row.get("synergy", {}).get("latency"), "+.2f"),
        ]
        for row in rows
    ]
    columns = ["", "latency (s)", "context (s)", "KV GB", "hits (%)", "imbalance", "nats", "synergy (s)"]
    show_table(console, "The original's variants by its protocol", columns, cells)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    name = "python -m pikv_hf.eval.studies.variants.protocol_study"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--model", default="smollm2-moe", help="as of pikv eval")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--variants", nargs="+", choices=[each.name for each in VARIANTS], metavar="VARIANT")
    parser.add_argument("--parts", type=Path, required=True, help="file to keep runs in; those there are taken")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, (model, tokenizer) = Console(highlight=False), load_model(arguments.model, arguments.dtype)
    tokens = torch.cat([text.ids(tokenizer) for text in texts()])
    size = CONTEXT + REQUESTS * (PROMPT + NEW)
    works = [Work.of(tokens, run * size, CONTEXT, PROMPT, NEW, REQUESTS) for run in range(arguments.runs)]
    chosen = [each for each in VARIANTS if arguments.variants is None or each.name in arguments.variants]
    about = {"model": arguments.model, "dtype": arguments.dtype, "threads": arguments.threads}
    about["sizes"] = [CONTEXT, PROMPT, NEW, REQUESTS]
    with quiet_transformers():
        for name in measure(model, chosen, works, about, arguments.parts):
            console.print(f"{name}: measured")
    found = [row for row in kept(arguments.parts) if about.items() <= row.items()]
    names = [key(variant) for variant in chosen]
    runs: dict[str, list[Row]] = {}
    for row in found:
        if "run" in row and row["run"] < arguments.runs and row["key"] in names:
            runs.setdefault(row["variant"], []).append(row)
    rows = rows_of(
        runs, {row["variant"]: row["hit_rate"] for row in found if "hit_rate" in row and row["key"] in names}
    )
    if arguments.output is not None:
        sources = [text.source for text in texts()]
        given = {"metric": METRIC, **about, "shards": SHARDS, "ratio": RATIO, "texts": sources}
        write_rows(arguments.output, given, {"variants": rows})
    _show(console, rows)


def measure(model: Any, variants: Sequence[Variant], works: Sequence[Work], about: Row, file: Path) -> Iterator[str]:
    """Measure what the file lacks, and yield what was. Runs are outermost: what a machine does hits all variants."""
    known = [row for row in kept(file) if about.items() <= row.items()]
    runs = {(row["key"], row["run"]) for row in known if "run" in row}
    for run, work in enumerate(works):
        for variant in variants:
            if (key(variant), run) not in runs:
                _warm_up(model, variant, work)
                row = {"variant": variant.name, "key": key(variant), "run": run}
                keep(file, [about | row | dataclasses.asdict(serve(model, variant, work))])
                yield f"{variant.name}, run {run + 1}"
    hits = {row["key"] for row in known if "hit_rate" in row}
    left = [variant for variant in variants if key(variant) not in hits]
    exact = exact_attention(model, works[0], min(STEPS, NEW)) if left else []
    for variant in left:
        rate = hit_rate(model, variant, works[0], exact)
        keep(file, [about | {"variant": variant.name, "key": key(variant), "hit_rate": rate}])
        yield f"{variant.name}, hits"


def key(variant: Variant) -> str:
    """Return what tells a variant's figures from those of another that had its name once."""
    return json.dumps([variant.options, variant.press, variant.ratio])


def _warm_up(model: Any, variant: Variant, work: Work) -> None:
    """Do a little of everything that is timed: the first call of its kind compiles kernels and fills memory."""
    little = Work(work.context[:, :512], tuple(each[:, :36] for each in work.requests[:1]), 32)
    serve(model, variant, little)


if __name__ == "__main__":
    main()
