"""The tables of docs/benchmarks.md about a pretrained model say what the committed results say."""

import json
import re
from pathlib import Path
from typing import Any

from pikv_hf.eval.report.summary_file import read_summary
from pikv_hf.eval.report.table import escape, times
from pikv_hf.eval.studies.overview import side_by_side as tables

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results"


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_the_docs_show_the_tables_of_the_committed_results() -> None:
    shown = (ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.side_by_side(RESULTS) in shown
    assert tables.speed_table(RESULTS / tables.SPEED) in shown


def _row(press: str, score: float, samples: int, share: float = 0.25, model: str = "smollm2") -> dict[str, Any]:
    about = {"model": model, "tokens": 1024, "question": "unseen", "kv_share": share * 1.1}
    about |= {"dtype": "bfloat16", "seed": 42}
    return about | {"press": press, "share": share, "score": score, "samples": samples}


def test_the_best_press_is_one_with_as_many_samples(tmp_path: Path) -> None:
    rows = [_row("DynamicCache", 90.0, 20, 1.0), _row("PiKVPress", 88.0, 20), _row("Good", 80.0, 10)]
    rows += [
        _row("QueryAwarePress", 99.0, 20),
        _row("Lucky", 100.0, 2),
        _row("Other", 99.0, 20) | {"tokens": 4096},
        _row("Worse", 70.0, 20),
    ]
    (tmp_path / tables.FILE).write_text(json.dumps({"scores": rows}))
    own, best = tables._presses(tmp_path)
    assert own == ["PiKVPress at 25% of the bytes", "–", "88.0 (90.0) at 27.5%, 20"]
    assert best == ["kvpress's best at 25%", "–", "Good 80.0 (90.0) at 27.5%, 10"]


def test_times_are_over_those_of_dynamic_cache() -> None:
    shown = cells(tables.speed_table(RESULTS / tables.SPEED))
    runs = {run.label: run for run in map(read_summary, (RESULTS / tables.SPEED).glob("*/summary.json"))}
    assert next(iter(shown)) == "DynamicCache"
    assert shown["DynamicCache"][:2] == ["1.00x", "1.00x"]
    assert len(shown) == len(runs)
    for label, run in runs.items():
        ratio = runs["DynamicCache"].cost.prefill_tokens_per_s / run.cost.prefill_tokens_per_s
        assert shown[escape(label)][0] == times(ratio)
