"""The original's variants (A) to (G) by its own protocol: latency, bytes, hit rate, load imbalance and synergy.

The original (arXiv 2508.06526) defines them in `downstream_tasks/EXPERIMENTAL_PROTOCOL.md` of its repository: a context
of 4,096 tokens, requests with prompts of 512 tokens that write 128, eight of them at once, three runs and their range.
Here they are measured on a pretrained model that was upcycled to a mixture of experts, and on its real text. Every run
is kept in a folder as soon as it is measured; what was stopped goes on there.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.quiet import quiet_transformers
from pikv_hf.eval.studies.codecs.real_text import prose
from pikv_hf.eval.studies.variants.attention_hits import exact_attention, hit_rate
from pikv_hf.eval.studies.variants.request_runs import Variant, Work, serve

Row = dict[str, Any]

CONTEXT, PROMPT, NEW, REQUESTS, RUNS = 4096, 512, 128, 8, 3
#: Tokens between the beginnings of the runs in the text.
APART = 2000
#: Steps of which hits are counted.
STEPS = 16
SHARDS = 4
#: Of what the original takes off: half.
RATIO = 0.5
_HASH: dict[str, Any] = {"placement": "hash", "num_shards": SHARDS}
_EXPERT, _BALANCED = _HASH | {"placement": "expert"}, _HASH | {"placement": "balanced"}
_LORA = "LoRAPress"

#: The press or option that comes closest to each of the original's modules, and every module alone.
VARIANTS = (
    Variant("(G) DynamicCache"),
    Variant("PiKVCache, exact", options=_HASH),
    Variant("expert placement", options=_EXPERT),
    Variant("balanced placement", options=_BALANCED),
    Variant("PyramidPress", options=_HASH, press="PyramidPress", ratio=RATIO),
    Variant("AdaKVPress(SnapKVPress)", options=_HASH, press="AdaKVPress(SnapKVPress)", ratio=RATIO),
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
        parts=("expert placement", "PyramidPress", "AdaKVPress(SnapKVPress)"),
        options=_EXPERT,
        press="PyramidPress(headwise=True)",
        ratio=RATIO,
    ),
    Variant("(C) LoRAPress", options=_HASH, press=_LORA, ratio=RATIO),
    Variant("(D) routing, page_mass, 25% of the pages", options=_HASH | {"routing": "page_mass", "max_pages": 0.25}),
    Variant(
        "(E) LoRAPress, ChunkKVPress(SnapKVPress)",
        parts=("(C) LoRAPress", "ChunkKVPress(SnapKVPress)"),
        options=_HASH,
        press=f"ComposedPress([{_LORA}, ChunkKVPress(SnapKVPress)])",
        ratio=RATIO,
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
    f"latency: seconds that a request takes ({PROMPT} tokens of prompt and {NEW} written as given; {REQUESTS} requests "
    "at once, a token of each in turn), mean and range over runs; context_seconds: to read the context of "
    f"{CONTEXT} tokens once and compress it; kv_bytes: live bytes of all requests at the end, what they share counted "
    "once; compression: those of DynamicCache over these; hit_rate: share of the exact model's attention that falls on "
    f"what a step reads, {STEPS} steps of one request, null where a press renumbers tokens; imbalance: variance over "
    "mean of the tokens of shards; fullest: most over mean; nats: mean negative log likelihood of what is written; "
    f"synergy: change of a figure against '{BASE}', less the sum of the changes that its parts make alone"
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
        row |= {"latency_range": [min(latencies), max(latencies)], "hit_rate": hits.get(variant.name)}
        for name, source in (("context_seconds",) * 2, ("kv_bytes", "open_bytes"), ("nats", "nats")):
            row[name] = statistics.fmean(run[source] for run in runs)
        for name in ("imbalance", "fullest"):
            found = [run[name] for run in runs if run[name] is not None]
            row[name] = statistics.fmean(found) if found else None
        rows[variant.name] = row
    for variant in VARIANTS:
        if variant.name in rows and (first := rows.get(VARIANTS[0].name)):
            rows[variant.name]["compression"] = first["kv_bytes"] / rows[variant.name]["kv_bytes"]
        if variant.parts and {variant.name, BASE, *variant.parts} <= rows.keys():
            rows[variant.name]["synergy"] = {
                name: synergy(rows, variant, name) for name in ("latency", "kv_bytes", "nats")
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
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep runs in; those there are taken")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, (model, tokenizer) = Console(highlight=False), load_model(arguments.model, arguments.dtype)
    tokens = prose().ids(tokenizer)
    works = [Work.of(tokens, run * APART, CONTEXT, PROMPT, NEW, REQUESTS) for run in range(arguments.runs)]
    arguments.parts.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in VARIANTS if arguments.variants is None or each.name in arguments.variants]
    runs: dict[str, list[Row]] = {}
    # Runs outermost: what a machine does in the course of an hour hits all variants.
    with quiet_transformers():
        for run, work in enumerate(works):
            for variant in chosen:
                file = arguments.parts / f"{variant.name}-{run}.json"
                if not file.exists():
                    # The first call of its kind compiles kernels and fills memory.
                    _warm_up(model, variant, work)
                    file.write_text(json.dumps(dataclasses.asdict(serve(model, variant, work))))
                    console.print(f"{variant.name}, run {run + 1}: measured")
                runs.setdefault(variant.name, []).append(json.loads(file.read_text()))
        hits = _hits(model, chosen, works[0], arguments.parts / "hits.json")
    rows = rows_of(runs, hits)
    if arguments.output is not None:
        about = {"metric": METRIC, "model": arguments.model, "dtype": arguments.dtype, "shards": SHARDS, "ratio": RATIO}
        write_rows(arguments.output, about, {"variants": rows})
    _show(console, rows)


def _warm_up(model: Any, variant: Variant, work: Work) -> None:
    """Do a little of everything that is timed."""
    little = Work(work.context[:, :512], tuple(each[:, :36] for each in work.requests[:1]), 32)
    serve(model, variant, little)


def _hits(model: Any, variants: Sequence[Variant], work: Work, file: Path) -> dict[str, float | None]:
    """Return the hit rate of each variant; those in the file are not measured anew."""
    known: dict[str, float | None] = json.loads(file.read_text()) if file.exists() else {}
    left = [variant for variant in variants if variant.name not in known]
    exact = exact_attention(model, work, min(STEPS, NEW)) if left else []
    for variant in left:
        known[variant.name] = hit_rate(model, variant, work, exact)
        file.write_text(json.dumps(known))
    return known


if __name__ == "__main__":
    main()
