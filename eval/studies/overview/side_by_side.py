"""Print the tables of docs/benchmarks.md about a pretrained model, from committed results.

One has it beside the bundled model: scores in percent, behind them the full cache's, and how many samples there were.
The other has time and memory of its caches and presses, over `DynamicCache`'s.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pikv_hf.presses
from pikv_hf.eval.real_model.load import DENSE
from pikv_hf.eval.report.summary_file import Cost, read_summary
from pikv_hf.eval.report.table import NOTHING, markdown, percent, times
from pikv_hf.eval.runner.models import REFERENCE
from pikv_hf.eval.studies.presses.equal_bytes_rows import COMPARED
from pikv_hf.eval.studies.presses.equal_bytes_sample import FULL
from pikv_hf.eval.studies.presses.equal_bytes_table import FILE

Row = dict[str, Any]

CODECS = ("int8", "int4", "auto")
SHARES = (0.25, 0.125)
#: Folder of the runs of eval/speed_real.yaml.
SPEED = "speed-real"


def side_by_side(results: Path) -> str:
    """Return the table in Markdown, from a folder of results."""
    pairs = [*_presses(results), *_codecs(results), *_routing(results), *_budgets(results)]
    return markdown(["score (full cache), samples", "bundled model", "SmolLM2-135M"], pairs)


def _cell(score: float, full: float, samples: int) -> str:
    return f"{score:.1f} ({full:.1f}), {samples}"


def _read(file: Path) -> Row:
    found: Row = json.loads(file.read_text())
    return found


def _presses(results: Path) -> Iterator[list[str]]:
    """Yield a row per share for PiKVPress, and one for the best of kvpress at it, whatever bytes that took."""
    setting = {"tokens": 1024, "question": "unseen", "dtype": "bfloat16", "seed": 42}
    rows = [row for row in _read(results / FILE)["scores"] if setting.items() <= row.items()]
    models = {model: [row for row in rows if row["model"] == model] for model in (REFERENCE, DENSE)}
    shares = sorted({row["share"] for row in rows if row["press"] == COMPARED}, reverse=True)
    for share in shares:
        own, peers = [], []
        for measured in models.values():
            full = next((row["score"] for row in measured if row["press"] == FULL), None)
            here = {row["press"]: row for row in measured if row["share"] == share and not _is_own(row["press"])}
            own_row = _one(measured, press=COMPARED, share=share)
            best = max(_as_many(here.values(), own_row), key=lambda row: row["score"], default=None)
            own.append(NOTHING if own_row is None or full is None else _pressed(own_row, full))
            peers.append(NOTHING if best is None or full is None else f"{best['press']} {_pressed(best, full)}")
        yield [f"{COMPARED} at {100 * share:.4g}% of the bytes", *own]
        yield [f"kvpress's best at {100 * share:.4g}%", *peers]


def _is_own(press: str) -> bool:
    return any(name in re.findall(r"\w+", press) for name in pikv_hf.presses.__all__)


def _as_many(rows: Iterable[Row], like: Row | None) -> list[Row]:
    """Return the rows that have at least half as many samples: those that were stopped early tell nothing."""
    return [row for row in rows if like is not None and 2 * row["samples"] >= like["samples"]]


def _pressed(row: Row, full: float) -> str:
    return f"{row['score']:.1f} ({full:.1f}) at {100 * row['kv_share']:.1f}%, {row['samples']}"


def _codecs(results: Path) -> Iterator[list[str]]:
    """Yield a row per codec: RULER at 1,024 tokens."""
    runs = {run.cache: run for run in (read_summary(file) for file in (results / "codecs").glob("*/summary.json"))}
    real = {row["codec"]: row for row in _read(results / "codecs-smollm2.json")["ruler"]}
    exact = runs["dynamic"].score.mean
    for codec in CODECS:
        run, row = runs[f"pikv:key_codec={codec},value_codec={codec}"], real[codec]
        yield [
            f"keys and values in {codec}",
            _cell(run.score.mean, exact, run.samples),
            _cell(row["score"], real["none"]["score"], row["samples"]),
        ]


def _routing(results: Path) -> Iterator[list[str]]:
    """Yield a row per policy and share of the pages: RULER at 2,048 tokens."""
    bundled = [
        row
        for row in [*_read(results / "routing.json")["ruler"], *_read(results / "routing-mass.json")["ruler"]]
        if (row["placement"], row["question"]) == ("sequential", "read in one call")
    ]
    real = _read(results / "routing-smollm2.json")["ruler"]
    for policy in ("page_bound", "page_mass"):
        for share in SHARES:
            named = {"policy": policy, "share": share, "tokens": 2048, "page_size": 16}
            cells = [_one(rows, **named) for rows in (bundled, real)]
            yield [
                f"{policy}, reads {100 * share:.4g}% of the pages",
                *(NOTHING if row is None else _cell(row["score"], row["exact"], row["samples"]) for row in cells),
            ]


def _budgets(results: Path) -> Iterator[list[str]]:
    """Yield rows for a budget with the default scheduler: needles, a prompt at once, a prompt in chunks."""
    bundled, real = _read(results / "budgets.json"), _read(results / "budgets-smollm2.json")["ruler"]
    needles = _one(bundled["generation"], scheduler="joint", placement="expert", share=0.25)
    exact = _one(bundled["generation"], scheduler="full")
    chunks, full = _one(bundled["ruler"], scheduler="joint"), _one(real, way="full")
    if needles is not None and exact is not None:
        cell = _cell(needles["both"], exact["both"], needles["needles"])
        yield ["budget=25%, needles after a long generation", cell, NOTHING]
    for name, way, row in (
        ("budget=25%, prompt at once", "budget 25%", None),
        ("budget=25%, prompt in chunks", "budget 25% in chunks of 512", chunks),
    ):
        own = _one(real, way=way)
        yield [
            name,
            NOTHING if row is None else _cell(row["score"], row["score"] - row["difference"], row["samples"]),
            NOTHING if own is None or full is None else _cell(own["score"], full["score"], own["samples"]),
        ]


def _one(rows: Sequence[Row], **named: Any) -> Row | None:
    """Return the one row with these values, None if there is none."""
    found = [row for row in rows if named.items() <= row.items()]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {named}")
    return found[0] if found else None


def speed_table(folder: Path) -> str:
    """Return a row per run below a folder: times of a prompt and of a token, bytes and peak over `DynamicCache`'s."""
    runs = [read_summary(file) for file in sorted(folder.glob("*/summary.json"))]
    (full,) = (run for run in runs if run.is_baseline)
    rows = sorted(([run.label, *_costs(run.cost, full.cost)] for run in runs), key=lambda row: _place(row, full.label))
    return markdown(["cache, press", "prompt", "token", "KV bytes", "peak MiB"], rows)


def _place(row: Sequence[str], first: str) -> tuple[Any, ...]:
    return row[0] != first, not row[0].startswith("PiKV"), row[0]


def _costs(cost: Cost, full: Cost) -> list[str]:
    speeds = (
        (full.prefill_tokens_per_s, cost.prefill_tokens_per_s),
        (full.decode_tokens_per_s, cost.decode_tokens_per_s),
    )
    ratios = [theirs / own if theirs is not None and own is not None else None for theirs, own in speeds]
    peak = NOTHING if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:,.0f}"
    return [*map(times, ratios), percent(cost.kv_share_prefill), peak]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="eval/results")
    results = parser.parse_args().results
    print(side_by_side(results))
    print(speed_table(results / SPEED), end="")


if __name__ == "__main__":
    main()
